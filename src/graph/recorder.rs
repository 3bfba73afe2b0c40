//! Recording of calls, for the tests and benches of this crate: a backward without candle's
//! autograd around it.

use std::cell::RefCell;

use candle_core::{Result, Tensor};

use candle_norm_support::messages;

/// The backward of a node that ran forward: the gradients of its arguments from that of its output.
pub(crate) type Handle = Box<dyn Fn(&Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync>;

thread_local! {
    static RECORDER: RefCell<Option<Option<Handle>>> = const { RefCell::new(None) };
}

/// Whether this thread is recording.
pub(super) fn is_recording() -> bool {
    RECORDER.with_borrow(Option::is_some)
}

/// Takes the backward of a node, if this thread is recording.
pub(super) fn record(
    backward: impl Fn(&Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
) {
    RECORDER.with_borrow_mut(|recorder| {
        if let Some(slot) = recorder {
            *slot = Some(Box::new(backward));
        }
    });
}

/// Runs `f`, and returns the backward of the last node that it made.
pub(crate) fn recording(f: impl FnOnce() -> Result<Tensor>) -> Result<(Tensor, Handle)> {
    RECORDER.set(Some(None));
    let y = f();
    match (y, RECORDER.take().flatten()) {
        (Ok(y), Some(handle)) => Ok((y, handle)),
        (Ok(_), None) => messages::internal("internals", "a call on the fused path"),
        (Err(e), _) => Err(e),
    }
}
