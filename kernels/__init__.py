"""One op per module: contract, torch reference and public function; Triton forms in ``_triton``."""
