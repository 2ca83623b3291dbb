//! Whether the disk is used: after a failure not for a while. No I/O.

use std::time::{Duration, Instant};

/// Pause after a failure; doubles up to [`LONGEST_PAUSE`] while nothing gets better.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// Reading, or writing.
#[derive(Debug)]
pub(super) struct Health {
    /// Why it is off, and until when.
    off: Option<(String, Instant)>,
    pause: Duration,
}

impl Health {
    pub(super) const fn new() -> Self {
        Self {
            off: None,
            pause: FIRST_PAUSE,
        }
    }

    /// Whether it may be tried.
    pub(super) fn may(&self, now: Instant) -> bool {
        self.off.as_ref().is_none_or(|(_, until)| now >= *until)
    }

    /// It went well; true if it had been off.
    pub(super) fn good(&mut self) -> bool {
        self.pause = FIRST_PAUSE;
        self.off.take().is_some()
    }

    /// It failed: the reason if that is news, for the log.
    pub(super) fn bad(&mut self, now: Instant, why: String) -> Option<String> {
        if !self.may(now) {
            // Begun before it was off.
            return None;
        }
        let news = self.off.is_none();
        let until = now + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        let told = news.then(|| why.clone());
        self.off = Some((why, until));
        told
    }

    /// Why it is off, and for how long still.
    pub(super) fn trouble(&self, now: Instant) -> Option<(&str, Duration)> {
        let (why, until) = self.off.as_ref()?;
        Some((why, until.saturating_duration_since(now)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_once_and_tried_again_later_and_later() {
        let mut now = Instant::now();
        let mut health = Health::new();
        assert!(health.may(now));
        assert_eq!(health.bad(now, "full".to_owned()).as_deref(), Some("full"));
        assert!(!health.may(now));
        assert_eq!(health.bad(now, "full".to_owned()), None);
        let mut last = Duration::ZERO;
        for _ in 0..3 {
            let (_, left) = health.trouble(now).unwrap();
            assert!(left > last);
            (now, last) = (now + left, left);
            assert!(health.may(now));
            assert_eq!(health.bad(now, "full".to_owned()), None, "no news");
        }
        assert!(health.good() && !health.good());
        assert!(health.trouble(now).is_none());
    }
}
