"""What is written of a case and of a batch: reports, DICOM objects, volumes, tables, worklist."""
