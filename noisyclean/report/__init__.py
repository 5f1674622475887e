"""The page that shows what a corpus, or a fit, turned out to be (entry: ``page.report``)."""
