"""From files to slices: discovery, archives, DICOM, NIfTI, and the geometry between them."""
