//! The parts of testkit that the kernels are tested with.

pub(crate) use testkit::{compare, data, oracle, subjects, view};
