"""Token mixers that are not attention: gated convolutions, spectral filters, scans."""
