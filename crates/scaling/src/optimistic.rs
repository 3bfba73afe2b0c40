//! Work that is prepared outside of a lock.

use std::sync::{PoisonError, RwLock};

/// Prepares work on what `look` sees of the value, and commits it under the lock.
///
/// The work is prepared outside of the lock, so that readers need not wait for it; and once more if
/// `still` finds another value by the time that it is there.
pub(super) fn optimistic<C, P, W, T, E>(
    lock: &RwLock<C>,
    look: impl Fn(&C) -> P,
    prepare: impl Fn(&P) -> Result<W, E>,
    still: impl Fn(&C, &P) -> bool,
    commit: impl FnOnce(&mut C, W) -> Result<T, E>,
) -> Result<T, E> {
    loop {
        let seen = look(&lock.read().unwrap_or_else(PoisonError::into_inner));
        let work = prepare(&seen)?;
        let mut current = lock.write().unwrap_or_else(PoisonError::into_inner);
        if still(&current, &seen) {
            return commit(&mut current, work);
        }
    }
}
