"""Files between two peers, named by their SHA-256: `/lumaris/blob/1`.

A lane carries the question and the answer. The bytes take a TLS connection of their own where the
peer can be dialled, and the lane itself as DATA frames where it cannot; a blocking socket in a
worker thread sees no difference, because the lane is pumped through a socket pair.

A file moves in chunks of 1 MiB. The receiver hashes it once, from the front to the back, while it
arrives. What lies in the part file of an attempt that failed is where the next attempt begins, and
proves nothing: it is hashed again, and only the whole file's hash gives it its name. Several
sources each name the hashes of the file's beginnings (after the first chunk, the second, ...; the
last is the file's own), so that the one that lies is known at the chunk.
"""
