"""The embedded corpus: drawn scenes with captions whose truth is known.

It exists to measure a cleaner where no download is possible. The pairs are drawn (:mod:`.scenes`, :mod:`.drawing`)
and described (:mod:`.captions`) from the same structure, so whether a caption is true of a picture is a fact, not an
opinion, and :func:`~noisyclean.corpus.synthetic.captions.holds` decides it.
"""

from noisyclean.corpus.synthetic.pairs import Kind, Pair, PairSampler
from noisyclean.corpus.synthetic.writing import generate_corpus

__all__ = ["Kind", "Pair", "PairSampler", "generate_corpus"]
