"""Codecs: how the values of a range of the flat vector become the bytes that travel, and back.

| name             | bytes for n values              | loses                                                          |
|------------------|---------------------------------|----------------------------------------------------------------|
| `float32`        | 4 n                             | nothing; encode and decode copy nothing                        |
| `float16`        | 2 n                             | 13 of 23 fraction bits; magnitudes above 65,504 become 65,504  |
| `bfloat16`       | 2 n                             | 16 of 23 fraction bits                                         |
| `int8[:block]`   | 4 ceil(n / block) + n           | half a level: 1/254 of the largest magnitude of the block      |
| `int4[:block]`   | 4 ceil(n / block) + ceil(n / 2) | half a level: 1/14 of the largest magnitude of the block       |
| `topk[:ratio]`   | k (2 or 4) + 4 k                | all but the k = ceil(ratio n) most important values            |
| `randomk[:ratio]`| k (2 or 4) + 4 k                | all but k values drawn at random                               |
| `planes[:A-B[:G]]`| 4 n / G + (B - A) ceil(n / 8)  | 1/2^B of the largest magnitude of the G values (see `planes`)  |

All numbers are little-endian. A quantized payload is the float32 scales, then the levels (see `quantization`). A sparse
payload is the k indices in rising order (uint16 while n <= 65,536, else uint32), then the k values in float32.

    pull = codec("int8:64")
    payload = pull.encode(x)                   # pull.num_bytes(x.size) bytes
    pull.decode(payload, x.size).values        # f32[n], near x

Sparse codecs send the selected values themselves; the receiver mixes only the coordinates that are `present`. What to
select by is the sender's: with top-k, the change accumulated since a coordinate was last sent (Dhasade, Kermarrec,
Pires, Sharma, Vujasinovic and Wigger, "Get More for Less in Decentralized Learning Systems", ICDCS 2023, arXiv
2306.04377, there on wavelet coefficients). The accumulator lives with the stored versions, not here.

The contract. A codec is pure: no state, clock or randomness of its own, so one instance serves every thread. `encode`
gives exactly `num_bytes(n)` bytes, the same for the same input. `decode` trusts no byte: a wrong length, index or scale
is a `CodecError`. It does not look at each value; whoever merges the result first asks `all_finite`.

To add one, write a function from the text after the colon (empty when there is none) to a `Codec`, and register it
from a module that the scenario already names, such as that of its model:

    @CODECS.register("sign")
    def _sign(argument: str) -> Codec: ...

`base` has the vocabulary and finds a codec by its name; `floats`, `integers`, `sparse` and `planes` have the codecs.
"""

from gossipfl.segments.codecs import floats, integers, planes  # noqa: F401 (registers them)
from gossipfl.segments.codecs.base import CODECS, Buffer, Codec, Decoded, all_finite, codec
from gossipfl.segments.codecs.sparse import SparseCodec

__all__ = ["CODECS", "Buffer", "Codec", "Decoded", "SparseCodec", "all_finite", "codec"]
