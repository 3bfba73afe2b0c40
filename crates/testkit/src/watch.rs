//! Failing instead of hanging.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Runs `body` on another thread, and fails if it does not end.
pub fn without_deadlock(body: impl FnOnce() + Send + 'static) {
    const LIMIT: Duration = Duration::from_secs(120);
    ends_within(LIMIT, body)
}

/// [`without_deadlock`] with a limit.
pub fn ends_within(limit: Duration, body: impl FnOnce() + Send + 'static) {
    let (sender, receiver) = mpsc::channel();
    let worker = thread::spawn(move || {
        body();
        // Dropped instead of sent where the body panics.
        sender.send(()).expect("somebody who waits");
    });
    match receiver.recv_timeout(limit) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("deadlock: not done after {limit:?}"),
        _ => {
            if let Err(panic) = worker.join() {
                std::panic::resume_unwind(panic)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::catch_unwind;

    #[test]
    fn what_hangs_or_panics_fails() {
        let short = Duration::from_millis(50);
        ends_within(short, || ());
        assert!(catch_unwind(|| ends_within(short, thread::park)).is_err());
        assert!(catch_unwind(|| ends_within(short, || panic!("on purpose"))).is_err());
    }
}
