//! Keeps the log readable: so many lines in so much time.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const LINES: u32 = 20;
const TIME: Duration = Duration::from_secs(10);

/// Lets some lines pass and counts the others.
#[derive(Debug, Default)]
pub(super) struct Gate(Mutex<Window>);

#[derive(Debug, Default)]
struct Window {
    since: Option<Instant>,
    passed: u32,
    silenced: u64,
}

impl Gate {
    /// Whether a line may be logged now; with the number of those that were not
    /// since the last one.
    pub(super) fn pass(&self, now: Instant) -> Option<u64> {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if window.since.is_none_or(|since| now >= since + TIME) {
            window.since = Some(now);
            window.passed = 0;
        }
        if window.passed >= LINES {
            window.silenced += 1;
            return None;
        }
        window.passed += 1;
        Some(std::mem::take(&mut window.silenced))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let (gate, now) = (Gate::default(), Instant::now());
        let passed = (0..100).filter(|_| gate.pass(now).is_some());
        assert_eq!(passed.count(), 20);
        assert_eq!(gate.pass(now + TIME), Some(80));
        assert_eq!(gate.pass(now + TIME), Some(0));
    }
}
