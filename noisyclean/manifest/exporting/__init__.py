"""``export``: the pairs of some splits as training frameworks and tables take them (entry: ``export``)."""
