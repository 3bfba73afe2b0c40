//! The package of the test programs, whose sources are in `tests` at the top: no user of the
//! library or of its examples compiles what only they need.
