//! Checks and file operations that several rooms share. They know tensors and paths alone.

pub(crate) mod files;
pub(crate) mod messages;
