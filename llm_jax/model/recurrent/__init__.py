"""Recurrent and convolutional mixers with attention's signature: `(x [batch, t, embed], ctx, state) -> (y, state)`.

Without a state a call sees the whole sequence in a parallel form (an associative scan, products of chunks, or an FFT;
the LSTM has none); with one it goes on from there, by any number of tokens. All are causal whatever the mask says.
Where the mask's segments say that a document ends, the state and the short convolutions start afresh, so packed
documents see nothing of each other. `ctx.real` keeps padding out of a state.

| mixer | file | state |
|---|---|---|
| Mamba | `mamba.py` | embed x state numbers |
| Mamba-2 | `mamba2.py` | a matrix per head |
| RetNet | `retnet.py` | a matrix per head |
| RWKV-4 | `rwkv.py` | a few numbers per channel |
| S4, S4D | `s4.py` | state numbers per channel |
| H3, GSS | `h3.py`, `gss.py` | that of their state space layers |
| LSTM | `lstm.py` | two numbers per unit |
| NPLM | `nplm.py` | the last vectors |
| Hyena | `hyena.py` | the inputs so far |
"""
