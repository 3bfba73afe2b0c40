//! Normalization layers for candle.
