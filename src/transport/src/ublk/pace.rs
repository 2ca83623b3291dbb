//! When a queue thread looks for the next request instead of sleeping, and for how long.
//!
//! To be woken costs a request more than to be served from memory. A thread that looks
//! for a while before it sleeps spares it that, if the next request comes meanwhile, and
//! burns a processor if it does not. So a thread looks only
//!
//! * while requests follow each other closely ([`Pace`]): a few in a row have to, and
//!   when looking finds nothing several times in a row, it is tried ever more rarely;
//! * within what all threads together may take ([`Allowance`]): at most half of the
//!   processors at once; on a machine with a single one never.
//!
//! An idle thread looks in vain once and sleeps. Times are nanoseconds; only [`Polling`]
//! has a clock.

use std::io;
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

    /// Looks for as long as `window`, if that may be; says whether something came. What only
    /// seemed to be there was not: who has looked in vain sleeps.
    ///
    /// # Errors
    /// Those of taking it.
    pub fn look(
        &self,
        pace: &mut Pace,
        window: u64,
        what: &mut impl LookedFor,
    ) -> io::Result<bool> {
        if !self.allowance.begin() {
            return Ok(false);
        }
        let begun = self.now();
        let looked = loop {
            let seems_there = what.seems_there();
            let looked = self.now().saturating_sub(begun);
            if seems_there {
                break Some(looked);
            }
            if looked >= window {
                break None;
            }
            std::hint::spin_loop();
        };
        let taken = looked.map(|_| what.take()).transpose();
        let found = matches!(taken, Ok(Some(true)));
        // A thread that was stopped meanwhile has not looked all the time.
        let spent = looked.unwrap_or(window).min(2 * window);
        self.allowance.end(spent, found);
        match found {
            true => pace.found(spent),
            false => pace.missed(),
        }
        taken.map(|_| found)
    }
}

/// What is looked for.
pub(super) trait LookedFor {
    /// Whether it may be there; costs next to nothing, and may say so in vain.
    fn seems_there(&mut self) -> bool;

    /// Takes it; says whether there was anything.
    ///
    /// # Errors
    /// It cannot be taken.
    fn take(&mut self) -> io::Result<bool>;
}

/// How many threads may look at once.
#[derive(Debug)]
pub(super) struct Allowance {
    /// At most so many.
    most: usize,
    /// Threads that look.
    looking: AtomicUsize,
    found: AtomicU64,
    missed: AtomicU64,
    spent: AtomicU64,
}

impl Allowance {
    /// For a process that may use so many processors.
    pub fn new(processors: usize) -> Self {
        Allowance {
            most: processors / 2,
            looking: AtomicUsize::new(0),
            found: AtomicU64::new(0),
            missed: AtomicU64::new(0),
            spent: AtomicU64::new(0),
        }
    }

    /// Whether one thread more may look now; if so, [`end`](Self::end) must follow.
    pub fn begin(&self) -> bool {
        let one_more = |looking| (looking < self.most).then_some(looking + 1);
        self.looking
            .fetch_update(Relaxed, Relaxed, one_more)
            .is_ok()
    }

    /// A thread has looked for `spent` nanoseconds, and something came or not.
    pub fn end(&self, spent: u64, found: bool) {
        self.looking.fetch_sub(1, Relaxed);
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
        fn wait(&mut self, gap: u64) {
            let begun = self.now;
            if let Some(window) = self.pace.window() {
                let looked = window.min(gap);
                let found = gap <= window;
                self.spent += looked;
                self.now += looked;
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
        (0..10_000).for_each(|_| thread.wait(20_000));
        // All but those that showed that it is worth it.
        assert_eq!(
            (thread.found, thread.missed),
            (10_000 - u64::from(STREAK), 0)
        );
        // It looks about as long as it must: when they stop, little is lost.
        assert!(thread.pace.window().unwrap() <= LIMIT);
        let mut quick = Thread::new();
        (0..10_000).for_each(|_| quick.wait(2_000));
        assert_eq!(quick.pace.window(), Some(LIMIT / LEAST));
    }

    #[test]
    fn who_is_idle_sleeps() {
        let mut thread = Thread::new();
        (0..100).for_each(|_| thread.wait(20_000));
        let (found, spent) = (thread.found, thread.spent);
        assert!(found > 0);
        // One look in vain, and none from then on, however long this goes on.
        (0..1000).for_each(|_| thread.wait(SECOND));
        assert_eq!((thread.found, thread.missed), (found, 1));
        assert!(thread.spent <= spent + LIMIT);
        assert_eq!(thread.pace.window(), None);
    }

    #[test]
    fn requests_that_come_now_and_then_are_slept_for() {
        for gap in [LIMIT * CLOSE, MILLISECOND, 100 * MILLISECOND] {
            let mut thread = Thread::new();
            (0..10_000).for_each(|_| thread.wait(gap));
            assert_eq!((thread.found, thread.missed), (0, 0), "{gap}");
        }
    }

    /// Such that always come a little too late for a look are the worst that there is.
    #[test]
    fn looking_in_vain_is_given_up_ever_longer() {
        let mut thread = Thread::new();
        (0..100_000).for_each(|_| thread.wait(LIMIT + 1));
        assert_eq!(thread.found, 0);
        assert!(thread.missed > 0);
        assert!(thread.missed < 200, "{} in vain", thread.missed);
        // When they come in time again, they are found again.
        (0..10_000).for_each(|_| thread.wait(10_000));
        assert!(thread.found > 5000, "{}", thread.found);
    }

    #[test]
    fn without_a_limit_it_never_looks() {
        let mut pace = Pace::new(Duration::ZERO);
        assert!(pace.is_off());
        (0..1000).for_each(|_| pace.slept(0));
        assert_eq!(pace.window(), None);
    }

    /// What seems to be there, or not, and never is.
    struct Nothing {
        seems: bool,
        taken: u32,
    }

    impl LookedFor for Nothing {
        fn seems_there(&mut self) -> bool {
            self.seems
        }

        fn take(&mut self) -> io::Result<bool> {
            self.taken += 1;
            Ok(false)
        }
    }

    #[test]
    fn what_only_seems_to_be_there_is_looked_for_in_vain() {
        for seems in [true, false] {
            let polling = Polling::new(Duration::from_micros(200), 2);
            let mut pace = polling.pace();
            let mut nothing = Nothing { seems, taken: 0 };
            (0..STREAK).for_each(|_| pace.slept(1000));
            let mut looks = 0;
            while let Some(window) = pace.window() {
                assert!(!polling.look(&mut pace, window, &mut nothing).unwrap());
                looks += 1;
            }
            assert!((1..10).contains(&looks), "{looks}");
            assert_eq!(nothing.taken, if seems { looks } else { 0 });
            let polls = polling.allowance.polls();
            assert_eq!((polls.found, polls.missed), (0, u64::from(looks)));
            assert!(polls.spent <= Duration::from_micros(400) * looks);
        }
    }

    #[test]
    fn only_half_of_the_processors_look_at_once() {
        let allowance = Allowance::new(5);
        assert!(allowance.begin() && allowance.begin());
        assert!(!allowance.begin());
        allowance.end(1000, true);
        assert!(allowance.begin());
        assert!(!allowance.begin());
        assert!(!Allowance::new(1).begin());
    }
}
