//! Names of collective calls.

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt;

thread_local! {
    static STEP: Cell<u64> = const { Cell::new(0) };
}

/// A collective call by its name and the number of the training step, by which engines see that all
/// ranks make the same one.
///
/// A rank that skips a step makes calls of the same names and lengths as the others, one step
/// later: the numbers tell them apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Call {
    name: Cow<'static, str>,
    step: u64,
}

impl Call {
    /// A call in the step that this thread is in ([`at_step`]).
    pub fn new(name: impl Into<Cow<'static, str>>) -> Self {
        Self {
            name: name.into(),
            step: STEP.get(),
        }
    }

    /// The name of what calls.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The number of the training step; 0 outside of any.
    pub fn step(&self) -> u64 {
        self.step
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of step {}", self.name, self.step)
    }
}

/// Runs `f`, in which all collective calls of this thread carry the number `step`.
///
/// Put the whole of a training step into it, forward, backward and update, with a number that all
/// ranks count alike. A rank that skipped a step, or runs one more, is then an error on every rank
/// at the next call, in place of sums of numbers that do not belong together. Scopes nest, and a
/// panic in `f` ends the scope.
///
/// ```
/// use candle_norm::distributed::{Call, at_step};
///
/// let call = at_step(7, || Call::new("loss"));
/// assert_eq!((call.name(), call.step()), ("loss", 7));
/// assert_eq!(Call::new("loss").step(), 0);
/// ```
pub fn at_step<T>(step: u64, f: impl FnOnce() -> T) -> T {
    struct Restore(u64);
    impl Drop for Restore {
        fn drop(&mut self) {
            STEP.set(self.0);
        }
    }
    let _restore = Restore(STEP.replace(step));
    f()
}
