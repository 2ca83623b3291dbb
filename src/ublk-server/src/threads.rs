//! Threads that are there before anybody needs one.
//!
//! Where memory is short a new thread is not only refused at times: it may be made and then
//! fail to map the stack on which it would handle a fault, and the standard library ends the
//! whole process for that. So what a request of a client needs a thread for runs on one that
//! waits for such work since the daemon's start.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::{fmt, io, mem, thread};

/// How many a daemon has: for some clients that wait for UFS, and two images whose layers are
/// looked up.
pub const COUNT: usize = 32;

/// How many work together on one thing at most.
const AT_ONCE: usize = 16;

/// What a thread does.
type Job = Box<dyn FnOnce() + Send>;

/// Threads that wait for work. Dropping this ends those that have none.
pub struct Threads(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// There is a job, or no more will come.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Threads that wait, those included for which there is a job already.
    waiting: usize,
    closed: bool,
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.state();
        write!(f, "Threads({} of them wait)", state.waiting)
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread: does one job after the other.
    fn run(&self) {
        let mut state = self.state();
        loop {
            state.waiting += 1;
            let idle = |state: &mut State| state.jobs.is_empty() && !state.closed;
            let changed = self.changed.wait_while(state, idle);
            state = changed.unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
            let Some(job) = state.jobs.pop_front() else {
                return;
            };
            drop(state);
            // The thread is for others, too. What panicked has been told by its hook.
            let _ = catch_unwind(AssertUnwindSafe(job));
            state = self.state();
        }
    }
}

impl Threads {
    /// Starts `count` threads.
    pub fn start(count: usize) -> io::Result<Self> {
        let threads = Self(Arc::default());
        for _ in 0..count {
            let shared = Arc::clone(&threads.0);
            let thread = thread::Builder::new().name("request".to_owned());
            thread.spawn(move || shared.run())?;
        }
        Ok(threads)
    }

    /// Has a thread that waits do `job`. Gives it back if there is none.
    fn lend(&self, job: Job) -> Result<(), Job> {
        let mut state = self.0.state();
        if state.waiting <= state.jobs.len() {
            return Err(job);
        }
        state.jobs.push_back(job);
        drop(state);
        self.0.changed.notify_one();
        Ok(())
    }

    /// Has a thread do `job` at once: one that waits, or else a new one, called `name`.
    pub fn run(&self, name: &str, job: impl FnOnce() + Send + 'static) -> io::Result<()> {
        match self.lend(Box::new(job)) {
            Ok(()) => Ok(()),
            Err(job) => {
                let thread = thread::Builder::new().name(name.to_owned());
                thread.spawn(job).map(drop)
            }
        }
    }

    /// Does `work` for each of `items`, on threads that wait and on this one, many at a
    /// time, the first of them first; begins with no more once one has failed. Returns when
    /// all is done: what succeeded, in any order, and the first error.
    pub fn each_of<T, R, E, F>(&self, items: Vec<T>, work: F) -> (Vec<R>, Result<(), E>)
    where
        T: Send + 'static,
        R: Send + 'static,
        E: Send + 'static,
        F: Fn(T) -> Result<R, E> + Send + Sync + 'static,
    {
        let threads = items.len().min(AT_ONCE);
        let shared = Arc::new(Each {
            state: Mutex::new(EachState {
                items: items.into(),
                under_way: 0,
                work: Some(Arc::new(work)),
                done: Vec::new(),
                failed: None,
            }),
            over: Condvar::new(),
        });
        for _ in 1..threads {
            let shared = Arc::clone(&shared);
            if self.lend(Box::new(move || shared.run())).is_err() {
                // The others do its part.
                break;
            }
        }
        shared.run();
        let under_way = |state: &mut EachState<T, R, E, F>| state.under_way > 0;
        let over = shared.over.wait_while(shared.state(), under_way);
        let mut state = over.unwrap_or_else(PoisonError::into_inner);
        // Whoever comes late finds nothing to do, and nothing of what `work` has.
        state.work = None;
        let failed = state.failed.take();
        (mem::take(&mut state.done), failed.map_or(Ok(()), Err))
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.0.state().closed = true;
        self.0.changed.notify_all();
    }
}

/// What threads do together.
struct Each<T, R, E, F> {
    state: Mutex<EachState<T, R, E, F>>,
    /// Nothing is under way.
    over: Condvar,
}

struct EachState<T, R, E, F> {
    items: VecDeque<T>,
    under_way: usize,
    work: Option<Arc<F>>,
    done: Vec<R>,
    failed: Option<E>,
}

/// One of them is no longer under way when this is dropped, also after a panic.
struct UnderWay<'a, T, R, E, F>(&'a Each<T, R, E, F>);

impl<T, R, E, F> Drop for UnderWay<'_, T, R, E, F> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.under_way -= 1;
        if state.under_way == 0 {
            self.0.over.notify_all();
        }
    }
}

impl<T, R, E, F> Each<T, R, E, F> {
    fn state(&self) -> MutexGuard<'_, EachState<T, R, E, F>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T, R, E, F: Fn(T) -> Result<R, E>> Each<T, R, E, F> {
    fn run(&self) {
        loop {
            let mut state = self.state();
            let work = state.work.clone();
            let (Some(work), Some(item)) = (work, state.items.pop_front()) else {
                return;
            };
            state.under_way += 1;
            drop(state);
            let _under_way = UnderWay(self);
            let result = work(item);
            // Nobody has it when all is done.
            drop(work);
            let mut state = self.state();
            match result {
                Ok(result) => state.done.push(result),
                Err(error) => {
                    state.items.clear();
                    state.failed.get_or_insert(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::{Barrier, mpsc};
    use std::thread::ThreadId;
    use std::time::{Duration, Instant};

    fn started(count: usize) -> Threads {
        let threads = Threads::start(count).unwrap();
        wait_for(&threads, count);
        threads
    }

    /// Waits until so many have nothing to do.
    fn wait_for(threads: &Threads, idle: usize) {
        let since = Instant::now();
        let is_idle = |state: &State| state.jobs.is_empty() && state.waiting == idle;
        while !is_idle(&threads.0.state()) {
            assert!(since.elapsed() < Duration::from_secs(60));
            thread::yield_now();
        }
    }

    /// Where a job runs.
    fn place(threads: &Threads) -> (ThreadId, Option<String>) {
        let (sender, receiver) = mpsc::channel();
        let job = move || {
            let thread = thread::current();
            let name = thread.name().map(str::to_owned);
            sender.send((thread.id(), name)).unwrap();
        };
        threads.run("more", job).unwrap();
        receiver.recv().unwrap()
    }

    #[test]
    fn a_thread_that_waits_is_taken_and_only_then_a_new_one_made() {
        let threads = started(1);
        let (first, name) = place(&threads);
        assert_eq!(name.as_deref(), Some("request"));
        wait_for(&threads, 1);
        assert_eq!(place(&threads).0, first);
        wait_for(&threads, 1);
        let (sender, receiver) = mpsc::channel::<()>();
        let busy = move || receiver.recv().unwrap();
        threads.run("more", busy).unwrap();
        let (other, name) = place(&threads);
        assert_ne!(other, first);
        assert_eq!(name.as_deref(), Some("more"));
        sender.send(()).unwrap();
        wait_for(&threads, 1);
        assert_eq!(place(&threads).0, first);
    }

    #[test]
    fn a_thread_outlives_a_panic() {
        let threads = started(1);
        let (first, _) = place(&threads);
        wait_for(&threads, 1);
        threads.run("more", || panic!("on purpose")).unwrap();
        wait_for(&threads, 1);
        assert_eq!(place(&threads).0, first);
    }

    #[test]
    fn many_work_together_and_all_is_done() {
        let threads = started(AT_ONCE - 1);
        let all = Barrier::new(AT_ONCE);
        let whole = Arc::new(());
        let (mut done, result) = threads.each_of((0..AT_ONCE).collect(), {
            let whole = Arc::clone(&whole);
            move |item| {
                // Passes only when all of them are here.
                all.wait();
                let _ = &whole;
                Ok::<_, ()>((item, thread::current().id()))
            }
        });
        assert_eq!(result, Ok(()));
        assert_eq!(Arc::strong_count(&whole), 1, "somebody has it still");
        done.sort_by_key(|(item, _)| *item);
        assert!(done.iter().map(|(item, _)| *item).eq(0..AT_ONCE));
        let places: HashSet<_> = done.into_iter().map(|(_, place)| place).collect();
        assert_eq!(places.len(), AT_ONCE);
        assert!(places.contains(&thread::current().id()));
    }

    #[test]
    fn one_alone_does_all_in_order() {
        let threads = Threads::start(0).unwrap();
        let (done, result) = threads.each_of(vec![3, 1, 2], Ok::<_, ()>);
        assert_eq!((done, result), (vec![3, 1, 2], Ok(())));
        let nothing: Vec<u8> = Vec::new();
        let (done, result) = threads.each_of(nothing, Err::<(), _>);
        assert_eq!((done, result), (vec![], Ok(())));
    }

    #[test]
    fn nothing_is_begun_after_an_error() {
        let threads = Threads::start(0).unwrap();
        let work = |item| if item == 2 { Err(item) } else { Ok(item) };
        let (done, result) = threads.each_of(vec![1, 2, 3], work);
        assert_eq!((done, result), (vec![1], Err(2)));
    }

    #[test]
    fn what_panics_is_not_waited_for() {
        let threads = started(1);
        let here = thread::current().id();
        let both = Barrier::new(2);
        let (done, result) = threads.each_of(vec![0, 1], move |_| {
            both.wait();
            assert_eq!(thread::current().id(), here, "on purpose");
            Ok::<_, ()>(here)
        });
        assert_eq!((done, result), (vec![here], Ok(())));
    }
}
