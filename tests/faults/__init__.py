"""Every fault of docs/reliability.md, F1 to F36, injected for real; a test is named after its number."""
