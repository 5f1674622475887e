"""``noisyclean bench``: every method on the same pairs, encoder, initial weights, batches and budget.

The truth is known here, because the noise is planted here; it is used to compare, and never reaches a method, save for
the oracle, which is told which pairs are true and is no competitor. (``rsum_best`` is of the epoch that is best on
clean validation pairs, as the field reports it; the models that score are those of the last.)
"""
