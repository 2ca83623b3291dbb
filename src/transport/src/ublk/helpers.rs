//! Threads that take large requests off a queue thread, which copies the others meanwhile.
//!
//! Whoever has several to serve puts them on the pile and then takes from it as many as it
//! has put there, so all of them are served even if no helper comes. The fixed number of
//! helpers is shared by all queue threads.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::mailbox::lock;

/// What a helper can do. Must not unwind.
pub(super) trait Work: Send + 'static {
    fn run(self);
}

/// What is to be done, for whoever comes first.
#[derive(Debug)]
pub(super) struct Pile<T> {
    state: Mutex<State<T>>,
    more: Condvar,
    helpers: usize,
}

#[derive(Debug)]
struct State<T> {
    tasks: VecDeque<T>,
    idle: usize,
    over: bool,
}

impl<T: Work> Pile<T> {
    /// Does as many as these, some of them by helpers. Another queue's may be among them,
    /// whose thread then does as many of ours: none is left on the pile that no thread is
    /// bound to take.
    pub fn share(&self, tasks: &mut Vec<T>) {
        if self.helpers == 0 || tasks.len() < 2 {
            return tasks.drain(..).for_each(Work::run);
        }
        let count = tasks.len();
        let mut state = lock(&self.state);
        state.tasks.extend(tasks.drain(..));
        let wanted = state.idle.min(count - 1);
        drop(state);
        (0..wanted).for_each(|_| self.more.notify_one());
        // Not until it is empty: others put theirs there, too, and would keep this thread
        // from its queue.
        for _ in 0..count {
            let Some(task) = self.take() else { return };
            task.run();
        }
    }

    fn take(&self) -> Option<T> {
        lock(&self.state).tasks.pop_front()
    }

    fn help(&self) {
        let mut state = lock(&self.state);
        while !state.over {
            if let Some(task) = state.tasks.pop_front() {
                drop(state);
                task.run();
                state = lock(&self.state);
                continue;
            }
            state.idle += 1;
            let woken = self.more.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }
}

/// The helpers. They end with this; what is on the pile then is dropped.
#[derive(Debug)]
pub(super) struct Helpers<T> {
    pile: Arc<Pile<T>>,
    threads: Vec<JoinHandle<()>>,
}

impl<T: Work> Helpers<T> {
    /// So many, which may be none.
    pub fn start(count: usize) -> io::Result<Self> {
        let pile = Arc::new(Pile {
            state: Mutex::new(State {
                tasks: VecDeque::new(),
                idle: 0,
                over: false,
            }),
            more: Condvar::new(),
            helpers: count,
        });
        let mut helpers = Helpers {
            pile,
            threads: Vec::new(),
        };
        for number in 0..count {
            let pile = Arc::clone(&helpers.pile);
            let thread = thread::Builder::new().name(format!("ublk-copy-{number}"));
            helpers.threads.push(thread.spawn(move || pile.help())?);
        }
        Ok(helpers)
    }

    /// Where work for them is put.
    pub fn pile(&self) -> &Arc<Pile<T>> {
        &self.pile
    }
}

impl<T> Drop for Helpers<T> {
    fn drop(&mut self) {
        let tasks = {
            let mut state = lock(&self.pile.state);
            state.over = true;
            std::mem::take(&mut state.tasks)
        };
        self.pile.more.notify_all();
        drop(tasks);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::thread::ThreadId;

    type Job = Box<dyn FnOnce() + Send>;

    impl Work for Job {
        fn run(self) {
            self();
        }
    }

    #[test]
    fn everything_is_done_once_whoever_does_it() {
        for helpers in 0..3 {
            let helpers: Helpers<Job> = Helpers::start(helpers).unwrap();
            let done: Arc<Vec<AtomicUsize>> = Arc::new((0..3000).map(|_| 0.into()).collect());
            thread::scope(|scope| {
                for queue in 0..3 {
                    let (pile, done) = (helpers.pile(), &done);
                    scope.spawn(move || {
                        let mut tasks: Vec<Job> = Vec::new();
                        for number in queue * 1000..(queue + 1) * 1000 {
                            let done = Arc::clone(done);
                            tasks.push(Box::new(move || {
                                done[number].fetch_add(1, Relaxed);
                            }));
                            if number % 7 == 0 {
                                pile.share(&mut tasks);
                                assert!(tasks.is_empty());
                            }
                        }
                        pile.share(&mut tasks);
                    });
                }
            });
            // A helper may still be at the last ones.
            drop(helpers);
            assert!(done.iter().all(|times| times.load(Relaxed) == 1));
        }
    }

    #[test]
    fn two_are_done_at_the_same_time() {
        let helpers: Helpers<Job> = Helpers::start(1).unwrap();
        let both = Arc::new(Barrier::new(2));
        let threads: Arc<Mutex<HashSet<ThreadId>>> = Arc::default();
        let mut tasks: Vec<Job> = Vec::new();
        for _ in 0..2 {
            let (both, threads) = (Arc::clone(&both), Arc::clone(&threads));
            tasks.push(Box::new(move || {
                // Nobody passes alone.
                both.wait();
                lock(&threads).insert(thread::current().id());
            }));
        }
        // Work that comes before a helper is ready is not overlooked by it.
        helpers.pile().share(&mut tasks);
        drop(helpers);
        assert_eq!(lock(&threads).len(), 2);
    }

    /// One task alone is not worth waking anybody for.
    #[test]
    fn a_single_one_stays_with_whoever_has_it() {
        let helpers: Helpers<Job> = Helpers::start(2).unwrap();
        for _ in 0..100 {
            let mine = thread::current().id();
            let mut tasks: Vec<Job> = vec![Box::new(move || {
                assert_eq!(thread::current().id(), mine);
            })];
            helpers.pile().share(&mut tasks);
        }
    }
}
