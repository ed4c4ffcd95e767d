"""From raw text to batches: vocabularies, SeqIO tasks, token maps, denoisers, packing, and the pipeline that feeds training."""
