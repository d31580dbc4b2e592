"""Batch CT imaging: a folder of studies in; reports, segmentations and a review worklist out."""
