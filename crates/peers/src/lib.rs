//! Benches of candle-norm, in the folder `benches`. `docs/performance.md` has the commands and what
//! they print.
