"""From raw text to batches: vocabularies, SeqIO tasks, token maps, denoisers, packing, and the source that feeds
training.
"""
