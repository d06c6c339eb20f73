"""Predictions -> official text files -> the published scores of E2E, WebNLG and DART."""
