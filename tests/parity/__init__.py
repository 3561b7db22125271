"""Parity with other libraries' models, where these are installed."""
