//! Stopping work that has no tick of its own, such as opening and aligning, from outside.
//!
//! Who calls the core may give a check, which [`poll`] asks at most every 50 ms from the thread that it
//! was given on. On other threads, and without a check, polling costs nothing.

use std::cell::{Cell, RefCell};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

const EVERY: Duration = Duration::from_millis(50);

type Check = Box<dyn FnMut() -> ControlFlow<()>>;

thread_local! {
    static GIVEN: Cell<bool> = const { Cell::new(false) };
    static CHECK: RefCell<Option<(Check, Instant)>> = const { RefCell::new(None) };
}

/// Do some work; where `check` answers to break, [`poll`] fails in it.
pub fn with_check<T>(
    check: impl FnMut() -> ControlFlow<()> + 'static,
    work: impl FnOnce() -> T,
) -> T {
    let outer = CHECK.replace(Some((Box::new(check), Instant::now())));
    let restored = Restored(outer);
    GIVEN.set(true);
    let result = work();
    drop(restored);
    result
}

/// Fail if the work that is going on must end.
///
/// # Errors
/// [`Error::Interrupted`].
pub fn poll() -> Result<()> {
    if !GIVEN.get() {
        return Ok(());
    }
    CHECK.with_borrow_mut(|given| match given {
        Some((check, last)) if last.elapsed() >= EVERY => {
            let answer = check();
            *last = Instant::now();
            if answer.is_break() { Err(Error::Interrupted) } else { Ok(()) }
        }
        _ => Ok(()),
    })
}

/// Puts the check of an outer call back, also where the work panics.
struct Restored(Option<(Check, Instant)>);

impl Drop for Restored {
    fn drop(&mut self) {
        GIVEN.set(self.0.is_some());
        CHECK.set(self.0.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_ends_when_its_check_says_so_and_only_there() {
        let ask_until_stopped = || {
            while poll().is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
            poll()
        };
        let answer = with_check(|| ControlFlow::Break(()), ask_until_stopped);
        assert!(answer.is_ok(), "asked again before its time");
        assert!(poll().is_ok());
    }
}
