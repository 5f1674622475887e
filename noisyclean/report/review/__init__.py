"""The local page on which a person judges a sample of pairs by eye (entries: ``session.Session``, ``serve.serve``)."""
