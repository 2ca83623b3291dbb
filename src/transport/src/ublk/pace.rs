//! When a queue thread looks for the next request instead of sleeping, and for how long.
//!
//! To be woken costs a request more than to be served from memory. A thread that looks
//! for a while before it sleeps spares it that, if the next request comes meanwhile, and
//! burns a processor if it does not. So a thread looks only
//!
//! * while requests follow each other closely ([`Pace`]): a few in a row have to, and
//!   when looking finds nothing several times in a row, it is tried ever more rarely;
//! * within what all threads together may spend ([`Allowance`]): at most half of
//!   the processors' time, on at most half of them at once; on a machine with a single
//!   one never.
//!
//! An idle thread looks in vain once and sleeps. Times are nanoseconds; only [`Polling`]
//! has a clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// A wait of so many times the longest look is short enough to be one between requests
/// that follow each other: who is woken needs longer than who looks.
const CLOSE: u64 = 4;
/// So many short waits in a row, until looking is worth a try.
const STREAK: u32 = 8;
/// The shortest look is this part of the longest.
const LEAST: u64 = 8;
/// Short waits to let pass when looking was in vain: so many, twice as many when it was
/// again, and so on for [`LONGEST`] times.
const PAUSE: u32 = 16;
const LONGEST: u32 = 8;

/// Of the processors' time threads may spend one part in so many looking.
const SHARE: u64 = 2;
/// What they did not spend within this time, nanoseconds, they may spend later.
const SAVED: u64 = 10_000_000;

/// How closely the requests of one thread follow each other.
#[derive(Debug)]
pub(super) struct Pace {
    /// The longest look.
    limit: u64,
    /// How long to look the next time; 0: not at all.
    window: u64,
    /// How long it took to find something, of late.
    typical: u64,
    /// Short waits in a row.
    streak: u32,
    /// Short waits to let pass before looking is tried again.
    pause: u32,
    /// How often looking was given up since it last found something.
    given_up: u32,
}

impl Pace {
    /// Never looks for longer than `limit`; zero: never.
    pub fn new(limit: Duration) -> Self {
        Pace {
            limit: nanoseconds(limit),
            window: 0,
            typical: 0,
            streak: 0,
            pause: 0,
            given_up: 0,
        }
    }

    /// Whether it is never looked.
    pub fn is_off(&self) -> bool {
        self.limit == 0
    }

    /// How long to look before the next sleep.
    pub fn window(&self) -> Option<u64> {
        (self.window > 0).then_some(self.window)
    }

    /// Slept, after looking or not: nothing had come for `waited` in all.
    pub fn slept(&mut self, waited: u64) {
        if waited > self.limit.saturating_mul(CLOSE) {
            self.streak = 0;
            self.window = 0;
            return;
        }
        self.streak = self.streak.saturating_add(1);
        if self.window > 0 || self.streak < STREAK {
            return;
        }
        if self.pause > 0 {
            self.pause -= 1;
        } else {
            self.window = self.limit;
        }
    }

    /// Looked, and something came after `looked`.
    pub fn found(&mut self, looked: u64) {
        self.typical = match self.typical {
            0 => looked,
            typical => typical - typical / 8 + looked / 8,
        };
        let least = (self.limit / LEAST).max(1);
        self.window = (3 * self.typical).clamp(least, self.limit);
        self.given_up = 0;
    }

    /// Looked, and nothing came.
    pub fn missed(&mut self) {
        self.window /= 2;
        if self.window < self.limit / LEAST || self.window == 0 {
            self.window = 0;
            self.typical = 0;
            self.streak = 0;
            self.pause = PAUSE << self.given_up;
            self.given_up = (self.given_up + 1).min(LONGEST);
        }
    }
}

/// How often queue threads have looked for requests before they slept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Polls {
    /// How often something came meanwhile.
    pub found: u64,
    /// How often nothing did.
    pub missed: u64,
    /// How long all that took.
    pub spent: Duration,
}

/// How queue threads look for requests.
#[derive(Debug, Clone)]
pub(super) struct Polling {
    /// The longest look.
    limit: Duration,
    pub allowance: Arc<Allowance>,
    /// What times are counted from.
    since: Instant,
}

impl Polling {
    /// For no longer than `limit`, in a process that may use so many processors.
    pub fn new(limit: Duration, processors: usize) -> Self {
        Polling {
            limit: if processors > 1 {
                limit
            } else {
                Duration::ZERO
            },
            allowance: Arc::new(Allowance::new(processors)),
            since: Instant::now(),
        }
    }

    /// For another thread.
    pub fn pace(&self) -> Pace {
        Pace::new(self.limit)
    }

    /// Nanoseconds, of the same beginning in all threads.
    pub fn now(&self) -> u64 {
        nanoseconds(self.since.elapsed())
    }
}

/// What all threads together may spend looking.
#[derive(Debug)]
pub(super) struct Allowance {
    /// Processors that the process may use.
    processors: u64,
    /// Threads that look.
    looking: AtomicUsize,
    /// Up to when the time that was spent is paid for; beyond now: nothing may be spent.
    paid: AtomicU64,
    found: AtomicU64,
    missed: AtomicU64,
    spent: AtomicU64,
}

impl Allowance {
    /// For a process that may use so many processors.
    pub fn new(processors: usize) -> Self {
        Allowance {
            processors: processors as u64,
            looking: AtomicUsize::new(0),
            paid: AtomicU64::new(0),
            found: AtomicU64::new(0),
            missed: AtomicU64::new(0),
            spent: AtomicU64::new(0),
        }
    }

    /// Whether one thread more may look now; if so, [`end`](Self::end) must follow.
    pub fn begin(&self, now: u64) -> bool {
        if self.paid.load(Relaxed) > now {
            return false;
        }
        let one_more = |looking: usize| {
            let fits = (looking as u64) < self.processors / 2;
            fits.then_some(looking + 1)
        };
        self.looking
            .fetch_update(Relaxed, Relaxed, one_more)
            .is_ok()
    }

    /// A thread has looked until `now`, for `spent`, and something came or not.
    pub fn end(&self, now: u64, spent: u64, found: bool) {
        self.looking.fetch_sub(1, Relaxed);
        let cost = spent.saturating_mul(SHARE) / self.processors.max(1);
        let pay = |paid: u64| Some(paid.max(now.saturating_sub(SAVED)).saturating_add(cost));
        let _ = self.paid.fetch_update(Relaxed, Relaxed, pay);
        let counter = if found { &self.found } else { &self.missed };
        counter.fetch_add(1, Relaxed);
        self.spent.fetch_add(spent, Relaxed);
    }

    /// What was done so far.
    pub fn polls(&self) -> Polls {
        Polls {
            found: self.found.load(Relaxed),
            missed: self.missed.load(Relaxed),
            spent: Duration::from_nanos(self.spent.load(Relaxed)),
        }
    }
}

/// Of times that end some day.
fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u64 = 50_000;
    const MILLISECOND: u64 = 1_000_000;
    const SECOND: u64 = 1000 * MILLISECOND;

    /// A queue thread in simulated time: requests come at given moments and are served at
    /// once, and being woken takes 20 µs.
    struct Thread {
        now: u64,
        pace: Pace,
        spent: u64,
        found: u64,
        missed: u64,
    }

    impl Thread {
        const WAKING: u64 = 20_000;

        fn new() -> Self {
            Thread {
                now: 0,
                pace: Pace::new(Duration::from_nanos(LIMIT)),
                spent: 0,
                found: 0,
                missed: 0,
            }
        }

        /// Waits for a request that comes `gap` after the last was served.
        fn wait(&mut self, gap: u64, allowance: Option<&Allowance>) {
            let begun = self.now;
            let window = self.pace.window();
            let window = window.filter(|_| allowance.is_none_or(|it| it.begin(begun)));
            if let Some(window) = window {
                let looked = window.min(gap);
                let found = gap <= window;
                self.spent += looked;
                self.now += looked;
                if let Some(allowance) = allowance {
                    allowance.end(self.now, looked, found);
                }
                if found {
                    self.found += 1;
                    return self.pace.found(looked);
                }
                self.missed += 1;
                self.pace.missed();
            }
            self.now = begun + gap + Self::WAKING;
            self.pace.slept(self.now - begun);
        }
    }

    #[test]
    fn requests_that_follow_closely_are_looked_for() {
        let mut thread = Thread::new();
        (0..10_000).for_each(|_| thread.wait(20_000, None));
        // All but those that showed that it is worth it.
        assert_eq!(
            (thread.found, thread.missed),
            (10_000 - u64::from(STREAK), 0)
        );
        // It looks about as long as it must: when they stop, little is lost.
        assert!(thread.pace.window().unwrap() <= LIMIT);
        let mut quick = Thread::new();
        (0..10_000).for_each(|_| quick.wait(2_000, None));
        assert_eq!(quick.pace.window(), Some(LIMIT / LEAST));
    }

    #[test]
    fn who_is_idle_sleeps() {
        let mut thread = Thread::new();
        (0..100).for_each(|_| thread.wait(20_000, None));
        let (found, spent) = (thread.found, thread.spent);
        assert!(found > 0);
        // One look in vain, and none from then on, however long this goes on.
        (0..1000).for_each(|_| thread.wait(SECOND, None));
        assert_eq!((thread.found, thread.missed), (found, 1));
        assert!(thread.spent <= spent + LIMIT);
        assert_eq!(thread.pace.window(), None);
    }

    #[test]
    fn requests_that_come_now_and_then_are_slept_for() {
        for gap in [LIMIT * CLOSE, MILLISECOND, 100 * MILLISECOND] {
            let mut thread = Thread::new();
            (0..10_000).for_each(|_| thread.wait(gap, None));
            assert_eq!((thread.found, thread.missed), (0, 0), "{gap}");
        }
    }

    /// Such that always come a little too late for a look are the worst that there is.
    #[test]
    fn looking_in_vain_is_given_up_ever_longer() {
        let mut thread = Thread::new();
        (0..100_000).for_each(|_| thread.wait(LIMIT + 1, None));
        assert_eq!(thread.found, 0);
        assert!(thread.missed > 0);
        assert!(thread.missed < 200, "{} in vain", thread.missed);
        // When they come in time again, they are found again.
        (0..10_000).for_each(|_| thread.wait(10_000, None));
        assert!(thread.found > 5000, "{}", thread.found);
    }

    #[test]
    fn without_a_limit_it_never_looks() {
        let mut pace = Pace::new(Duration::ZERO);
        assert!(pace.is_off());
        (0..1000).for_each(|_| pace.slept(0));
        assert_eq!(pace.window(), None);
    }

    /// Whatever comes, all threads together look for no longer than their share.
    #[test]
    fn all_threads_together_have_a_share_of_the_time() {
        for processors in [1, 2, 4, 64] {
            let allowance = Allowance::new(processors);
            let mut threads: Vec<_> = (0..16).map(|_| Thread::new()).collect();
            let until = SECOND / 10;
            // The one that is behind goes on, always with the gap that it just misses or
            // just finds.
            let mut turn = 0;
            loop {
                let thread = threads.iter_mut().min_by_key(|thread| thread.now).unwrap();
                if thread.now > until {
                    break;
                }
                thread.wait(LIMIT - turn % 3, Some(&allowance));
                turn += 1;
            }
            let spent: u64 = threads.iter().map(|thread| thread.spent).sum();
            let share = (until + SAVED) * processors as u64 / SHARE;
            // Those that look at the moment are not counted yet.
            let most = share + (processors as u64 / 2) * LIMIT;
            assert!(spent <= most, "{spent} of {most} on {processors}");
            if processors == 1 {
                assert_eq!(spent, 0);
            } else {
                // None looks all the time.
                let can = most.min(threads.len() as u64 * until);
                assert!(spent > can / 2, "{spent} of {can} on {processors}");
            }
            let polls = allowance.polls();
            assert_eq!(polls.spent, Duration::from_nanos(spent));
            assert_eq!(polls.found, threads.iter().map(|it| it.found).sum::<u64>());
        }
    }

    #[test]
    fn only_half_of_the_processors_look_at_once() {
        let allowance = Allowance::new(5);
        assert!(allowance.begin(0) && allowance.begin(0));
        assert!(!allowance.begin(0));
        allowance.end(1000, 1000, true);
        assert!(allowance.begin(SECOND));
        assert!(!allowance.begin(SECOND));
    }
}
