//! Shared parts of the test programs of candle-norm: numbers and tensors of them ([`data`]),
//! comparisons ([`compare`], [`errors`]), normalization in float64 ([`oracle`]), the layers by one
//! signature ([`subjects`]) and in a table ([`table`], [`tracked`]), memory layouts ([`view`]),
//! variables of a model ([`vars`]), settings of properties ([`properties`]), processes of their own
//! ([`child`]), a limit of time ([`watch`]), the faults of candle ([`faults`]) and the emulator of
//! the CUDA kernels ([`emulated`]).
//!
//! Everything here panics where a test should fail.

pub mod child;
pub mod compare;
pub mod data;
pub mod emulated;
pub mod errors;
pub mod faults;
pub mod functions;
pub mod oracle;
pub mod properties;
pub mod subjects;
pub mod table;
pub mod tracked;
pub mod vars;
pub mod view;
pub mod watch;
