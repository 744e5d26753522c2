//! Threads that share one piece of work while the thread that asked for it watches them.
//!
//! Owns starting, watching and ending them; the caller says what they do and how they are stopped.
//! Invariant: no worker outlives the call. One that panics stops the others, which might wait for its
//! result forever.

use std::ops::ControlFlow;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

/// Makes the thread that watches the workers tick at once.
pub(crate) struct Waker(Sender<()>);

impl Waker {
    pub(crate) fn wake(&self) {
        // It fails only if nobody watches any longer.
        let _ = self.0.send(());
    }
}

/// Run `work` on `count` threads, or on this one if that is zero, until all have returned; return
/// whether `tick` broke it off.
///
/// `tick` runs on this thread, at least every `every`, when a worker wakes it and once at the end.
/// `stop` must make every `work` return soon, and may be called more than once and from any thread.
///
/// # Panics
/// If a worker panicked, once all have returned.
pub(crate) fn run(
    count: usize,
    every: Duration,
    work: &(dyn Fn(&Waker) + Sync),
    stop: &(dyn Fn() + Sync),
    mut tick: impl FnMut() -> ControlFlow<()>,
) -> bool {
    thread::scope(|scope| {
        let (done, finished) = mpsc::channel::<()>();
        let mut spawned = 0;
        for _ in 0..count {
            let waker = Waker(done.clone());
            let worker = move || {
                let guard = StopOnPanic(stop);
                work(&waker);
                drop((guard, waker));
            };
            // If the system allows no more threads, the existing ones do all the work.
            match thread::Builder::new().spawn_scoped(scope, worker) {
                Ok(_) => spawned += 1,
                Err(_) => break,
            }
        }
        let waker = Waker(done);
        if spawned == 0 {
            work(&waker);
        }
        drop(waker);
        // The channel closes when the last worker has gone, even if one panicked.
        loop {
            let ended = matches!(finished.recv_timeout(every), Err(RecvTimeoutError::Disconnected));
            // One tick answers to all who woke this thread so far.
            while finished.try_recv().is_ok() {}
            if tick().is_break() {
                stop();
                return true;
            }
            if ended {
                return false;
            }
        }
    })
}

struct StopOnPanic<'a>(&'a (dyn Fn() + Sync));

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            (self.0)();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{self, AssertUnwindSafe};
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;

    const EVERY: Duration = Duration::from_millis(5);

    fn wait_for(flag: &AtomicBool) {
        while !flag.load(Ordering::SeqCst) {
            thread::yield_now();
        }
    }

    #[test]
    fn a_worker_that_panics_stops_those_that_wait_for_it() {
        let (stopped, started) = (AtomicBool::new(false), AtomicUsize::new(0));
        let work = |_: &Waker| {
            if started.fetch_add(1, Ordering::SeqCst) == 0 {
                panic!("as one in a kernel would");
            }
            wait_for(&stopped);
        };
        let stop = || stopped.store(true, Ordering::SeqCst);
        let hook = panic::take_hook();
        panic::set_hook(Box::new(|_| {}));
        let ended = panic::catch_unwind(AssertUnwindSafe(|| {
            run(3, EVERY, &work, &stop, || ControlFlow::Continue(()))
        }));
        panic::set_hook(hook);
        assert!(ended.is_err() && stopped.load(Ordering::SeqCst));
    }

    #[test]
    fn a_tick_that_breaks_off_stops_everyone() {
        let stopped = AtomicBool::new(false);
        let stop = || stopped.store(true, Ordering::SeqCst);
        let mut ticks = 0;
        let broken = run(2, EVERY, &|_| wait_for(&stopped), &stop, || {
            ticks += 1;
            if ticks == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(broken && ticks == 3);
    }

    #[test]
    fn work_that_ends_is_not_broken_off_and_ticks_at_least_once() {
        let (count, mut ticks) = (AtomicUsize::new(0), 0);
        let work = |_: &Waker| {
            count.fetch_add(1, Ordering::SeqCst);
        };
        let broken = run(4, Duration::from_secs(60), &work, &|| {}, || {
            ticks += 1;
            ControlFlow::Continue(())
        });
        assert!(!broken && count.load(Ordering::SeqCst) == 4 && ticks == 1);
    }
}
