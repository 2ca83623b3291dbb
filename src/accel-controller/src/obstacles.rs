//! What keeps the controller from its work, as the service's condition tells it.
//!
//! What goes wrong once passes: what counts is what goes wrong again and again, for at least
//! ten seconds. A controller that is dead says nothing of that; its Lease tells (see
//! [`crate::lead::Ear`]).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The service's condition that a controller leads, and nothing keeps it from its work.
pub const CONTROLLER_READY: &str = "ControllerReady";

/// How long something goes wrong before it counts.
const LASTING: Duration = Duration::from_secs(10);
/// A watch says only that it has failed, not that it works again: for so long it counts. It is
/// tried again after half a minute at most, or twice that by chance.
const QUIET: Duration = Duration::from_secs(90);

/// A part of the work; what comes first is said first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// To look at the service, and write its status.
    Service,
    /// To look at nodes.
    Nodes,
    /// To look at tasks.
    Tasks,
    /// To notice changes.
    Watch,
}

impl Part {
    const fn reason(self) -> &'static str {
        match self {
            Self::Service => "CannotTellOfService",
            Self::Nodes => "CannotLookAtNodes",
            Self::Tasks => "CannotLookAtTasks",
            Self::Watch => "CannotWatch",
        }
    }
}

#[derive(Debug)]
struct Obstacle {
    first: Instant,
    last: Instant,
    what: String,
}

/// All that has gone wrong, and has not gone well since.
#[derive(Debug, Default)]
pub struct Obstacles(BTreeMap<Part, Obstacle>);

impl Obstacles {
    /// This part has gone wrong, in words.
    pub fn met(&mut self, part: Part, what: String, now: Instant) {
        let met = self.0.entry(part).or_insert_with(|| Obstacle {
            first: now,
            last: now,
            what: String::new(),
        });
        if Self::is_over(part, met, now) {
            met.first = now;
        }
        (met.last, met.what) = (now, what);
    }

    /// This part has gone well.
    pub fn passed(&mut self, part: Part) {
        self.0.remove(&part);
    }

    fn is_over(part: Part, met: &Obstacle, now: Instant) -> bool {
        part == Part::Watch && now.duration_since(met.last) > QUIET
    }

    /// What is to be said of it: a condition's reason and message.
    pub fn lasting(&self, now: Instant) -> Option<(&'static str, &str)> {
        let lasts = |(part, met): &(&Part, &Obstacle)| {
            met.last.duration_since(met.first) >= LASTING && !Self::is_over(**part, met, now)
        };
        let (part, met) = self.0.iter().find(lasts)?;
        Some((part.reason(), &met.what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_wrong_again_and_again_counts_until_it_goes_well() {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let mut all = Obstacles::default();
        assert_eq!(all.lasting(at(0)), None);
        all.met(Part::Tasks, "t".to_owned(), at(0));
        all.met(Part::Tasks, "t".to_owned(), at(9));
        assert_eq!(all.lasting(at(9)), None, "that may pass");
        all.passed(Part::Tasks);
        all.met(Part::Tasks, "t".to_owned(), at(10));
        assert_eq!(all.lasting(at(10)), None);
        all.met(Part::Tasks, "again".to_owned(), at(20));
        let tasks = Some(("CannotLookAtTasks", "again"));
        assert_eq!(all.lasting(at(1000)), tasks);
        // The others do not end that, and the service comes first.
        all.met(Part::Service, "s".to_owned(), at(20));
        all.met(Part::Service, "s".to_owned(), at(35));
        assert_eq!(all.lasting(at(35)), Some(("CannotTellOfService", "s")));
        all.passed(Part::Service);
        all.passed(Part::Nodes);
        assert_eq!(all.lasting(at(35)), tasks);
        all.passed(Part::Tasks);
        assert_eq!(all.lasting(at(35)), None);
    }

    #[test]
    fn a_watch_that_is_silent_works_again() {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let mut all = Obstacles::default();
        all.met(Part::Watch, "w".to_owned(), at(0));
        all.met(Part::Watch, "w".to_owned(), at(60));
        assert_eq!(all.lasting(at(150)), Some(("CannotWatch", "w")));
        assert_eq!(all.lasting(at(151)), None);
        all.met(Part::Watch, "w".to_owned(), at(151));
        assert_eq!(all.lasting(at(151)), None, "that is something else");
        all.met(Part::Watch, "w".to_owned(), at(170));
        assert!(all.lasting(at(170)).is_some());
    }
}
