"""Token mixers that are not attention: gated convolutions, spectral mixers, scans."""
