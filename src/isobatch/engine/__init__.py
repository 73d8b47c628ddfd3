"""The engine: from requests to replies. Its scheduling half is plain Python and decides no bit of a reply."""
