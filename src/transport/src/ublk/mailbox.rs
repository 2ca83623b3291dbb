//! How results and orders come to a queue thread: without a lock if it has finished the
//! request itself, through a mailbox if another thread has. Whoever leaves something while
//! the thread sleeps in its ring wakes it.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{io, mem};

use accel_sys::ublk::Wake;

/// A result on its way to the driver.
#[derive(Debug, Clone, Copy)]
pub(super) struct Done {
    pub slot: u32,
    pub tag: u16,
    pub result: i32,
}

#[derive(Debug, Default)]
struct Mail {
    done: Vec<Done>,
    /// Orders wait in their channel.
    orders: bool,
}

/// Where other threads leave work for a queue thread.
#[derive(Debug)]
pub(super) struct Mailbox {
    mail: Mutex<Mail>,
    /// There is mail.
    full: AtomicBool,
    /// The queue thread waits in its ring, or is about to.
    asleep: AtomicBool,
    /// What the thread's ring polls.
    pub wake: Wake,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that runs under these locks can leave half a change behind.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Mailbox {
    pub fn new() -> io::Result<Self> {
        Ok(Mailbox {
            mail: Mutex::default(),
            full: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            wake: Wake::new()?,
        })
    }

    fn leave(&self, put: impl FnOnce(&mut Mail)) {
        put(&mut lock(&self.mail));
        // This store and the load that follows, against those in `may_sleep`: at least
        // one of the two threads sees what the other has stored.
        self.full.store(true, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst) {
            self.wake.wake();
        }
    }

    /// An order waits in its channel.
    pub fn order(&self) {
        self.leave(|mail| mail.orders = true);
    }

    /// Leaves a result, whichever thread this is.
    pub fn answer(self: &Arc<Self>, result: Done) {
        if !Own::keep(self, result) {
            self.leave(|mail| mail.done.push(result));
        }
    }

    /// Adds the results that were left to `done`; says whether there are orders. Takes no
    /// lock if nothing was left.
    pub fn collect(&self, done: &mut Vec<Done>) -> bool {
        if !self.full.load(Ordering::SeqCst) {
            return false;
        }
        // Whoever leaves something that is not taken here says so after this.
        self.full.store(false, Ordering::SeqCst);
        let mut mail = lock(&self.mail);
        done.append(&mut mail.done);
        mem::take(&mut mail.orders)
    }

    /// Whether something was left.
    pub fn has_mail(&self) -> bool {
        self.full.load(Ordering::SeqCst)
    }

    /// Whether the queue thread may wait in its ring: if so, who leaves something from
    /// here on wakes it.
    pub fn may_sleep(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        if self.full.load(Ordering::SeqCst) {
            self.asleep.store(false, Ordering::SeqCst);
            return false;
        }
        true
    }

    /// The thread has waited, for whatever reason it woke.
    pub fn awake(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }
}

/// Results of requests that a queue thread has finished itself: they need neither lock
/// nor wake-up.
#[derive(Default)]
pub(super) struct Own {
    /// Address of this thread's mailbox; 0 if it is no queue thread.
    mailbox: Cell<usize>,
    done: RefCell<Vec<Done>>,
}

thread_local! {
    static OWN: Own = const { Own { mailbox: Cell::new(0), done: RefCell::new(Vec::new()) } };
}

impl Own {
    /// This thread is the queue thread of `mailbox`, which it keeps alive.
    pub fn begin(mailbox: &Arc<Mailbox>) {
        OWN.with(|own| own.mailbox.set(Arc::as_ptr(mailbox).addr()));
    }

    /// Keeps a result, if this is the queue thread of `mailbox`; says whether it is.
    fn keep(mailbox: &Arc<Mailbox>, result: Done) -> bool {
        let keep = |own: &Own| {
            let mine = own.mailbox.get() == Arc::as_ptr(mailbox).addr();
            if mine {
                own.done.borrow_mut().push(result);
            }
            mine
        };
        // A thread that ends is no queue thread any more.
        OWN.try_with(keep).unwrap_or(false)
    }

    /// Takes the results that were kept.
    pub fn take(done: &mut Vec<Done>) {
        OWN.with(|own| done.append(&mut own.done.borrow_mut()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::sync::atomic::AtomicI32;
    use std::thread;

    /// A result that is left while the queue thread makes up its mind to sleep must wake
    /// it: whoever reads would otherwise wait until something else happens.
    #[test]
    fn no_result_is_slept_over() {
        const RESULTS: i32 = 100_000;
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let seen = Arc::new(AtomicI32::new(0));
        let (its, taken) = (Arc::clone(&mailbox), Arc::clone(&seen));
        // One at a time, as soon as the last was taken: about when its taker falls asleep.
        let other = thread::spawn(move || {
            for result in 0..RESULTS {
                let (slot, tag) = (0, 1);
                its.answer(Done { slot, tag, result });
                for turn in 0.. {
                    match taken.load(Ordering::Relaxed) {
                        ended if ended < 0 => return,
                        count if count > result => break,
                        _ if turn % 1024 == 1023 => thread::yield_now(),
                        _ => std::hint::spin_loop(),
                    }
                }
            }
        });
        Own::begin(&mailbox);
        // The thread's own come without a wake-up.
        let (slot, tag) = (0, 0);
        let result = 0;
        mailbox.answer(Done { slot, tag, result });
        let (mut done, mut own, mut next) = (Vec::new(), 0, 0);
        while next < RESULTS {
            Own::take(&mut done);
            assert!(!mailbox.collect(&mut done));
            for Done { tag, result, .. } in done.drain(..) {
                if tag == 0 {
                    own += 1;
                } else {
                    assert_eq!(result, next);
                    next += 1;
                }
            }
            seen.store(next, Ordering::Relaxed);
            for _ in 0..next % 256 {
                std::hint::spin_loop();
            }
            if next < RESULTS && mailbox.may_sleep() {
                let limit = Timespec {
                    tv_sec: 30,
                    tv_nsec: 0,
                };
                let mut files = [PollFd::new(mailbox.wake.file(), PollFlags::IN)];
                let woken = poll(&mut files, Some(&limit)).unwrap();
                if woken == 0 {
                    seen.store(-1, Ordering::Relaxed);
                    panic!("nobody wakes the thread for result {next}");
                }
                let _ = rustix::io::read(mailbox.wake.file(), &mut [0; 8]);
                mailbox.awake();
            }
        }
        assert_eq!(own, 1);
        other.join().unwrap();
    }
}
