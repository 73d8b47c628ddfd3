"""Row 5: an HTTP server that speaks OpenAI's protocol, and a page. Needs the extra [server]."""
