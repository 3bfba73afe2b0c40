//! What several test programs share.

// Every test program compiles its own copy of this module and uses a part of it.
#![allow(dead_code)]

pub(crate) mod compare;
pub(crate) mod data;
pub(crate) mod oracle;
pub(crate) mod subjects;
