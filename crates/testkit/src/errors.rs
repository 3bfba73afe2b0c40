//! Messages of errors.

use candle_core::Result;

/// The text of an error; panics where there is none.
#[track_caller]
pub fn message<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("expected an error, got a result"),
        Err(error) => error.to_string(),
    }
}

/// Panics unless `result` is an error whose text has every part of `expected`.
#[track_caller]
pub fn assert_message<T>(result: Result<T>, expected: &[&str]) {
    let Err(error) = result else {
        panic!("expected an error with {expected:?}, got a result")
    };
    let message = error.to_string();
    for part in expected {
        assert!(message.contains(part), "expected {part:?} in: {message}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::catch_unwind;

    #[test]
    fn every_part_is_looked_for() {
        let error = || -> Result<()> { candle_core::bail!("expected 2, got 3") };
        // A backtrace may follow.
        assert!(message(error()).starts_with("expected 2, got 3"));
        assert_message(error(), &["expected 2", "got 3"]);
        assert!(catch_unwind(|| assert_message(error(), &["expected 2", "got 4"])).is_err());
        assert!(catch_unwind(|| assert_message(Ok(()), &[])).is_err());
        assert!(catch_unwind(|| message(Ok(()))).is_err());
    }
}
