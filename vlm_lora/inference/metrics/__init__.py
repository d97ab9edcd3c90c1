"""Scores for captions and answers: strings in, numbers out.

Every score is a fraction (0 to 1, not percent), except CIDEr-D, which runs from 0 to 10 as published.
Scores come per sample where the metric allows it, so that a caller can put an interval on a mean or compare two models
on the same samples. All functions raise ``ValueError`` for an empty corpus, lists of unequal length, a sample without a
reference, or one string where a list of strings is meant.
"""
