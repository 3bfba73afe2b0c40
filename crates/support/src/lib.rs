//! Messages, files, blocks of columns and copies to the host that [candle-norm] and its scalers
//! share.
//!
//! Functions here know tensors and paths alone. Their interface follows the needs of candle-norm,
//! and no version promises any of it.
//!
//! [candle-norm]: https://docs.rs/candle-norm

mod columns;
pub mod files;
pub mod host;
pub mod messages;

pub use columns::columns;
