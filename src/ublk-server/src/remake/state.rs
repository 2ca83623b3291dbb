//! Which layer is made, was made, or cannot be. No clock, no I/O.

use super::Recipe;
use super::job::Failure;
use accel_source::Readiness;
use accel_ufs::names::LayerName;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// Pause after a failure; doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// How long whoever waited for a layer may take to see that it is there.
const SEEN: Duration = Duration::from_secs(30);

/// All layers that are exported and whose origin is known, by the path of their image
/// without its extension.
#[derive(Debug, Default)]
pub(super) struct State {
    layers: BTreeMap<String, Layer>,
    queue: VecDeque<String>,
    running: Option<Running>,
    /// Everything that is exported is known.
    begun: bool,
    /// There may be something to remove.
    clean: bool,
    closed: bool,
    pub made: u64,
    pub failed: u64,
}

#[derive(Debug)]
struct Layer {
    recipe: Recipe,
    phase: Phase,
    /// After the next failure.
    pause: Duration,
}

#[derive(Debug)]
enum Phase {
    Idle,
    Queued,
    Running,
    Ready {
        since: Instant,
    },
    Failed {
        why: String,
        lasting: bool,
        until: Instant,
    },
}

#[derive(Debug)]
struct Running {
    layer: String,
    since: Option<Instant>,
    bytes: u64,
    /// The layer is not exported any more.
    unwanted: bool,
}

/// What a request is told.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It is there.
    Read,
    /// It is being made, or will be.
    Making(String),
    NotMade {
        reason: String,
        lasting: bool,
    },
}

/// What the thread is to do.
#[derive(Debug)]
pub(super) enum Work {
    End,
    /// Remove what is not in `keep`: images.
    Clean {
        keep: Vec<String>,
    },
    Make {
        recipe: Box<Recipe>,
        keep: Vec<String>,
    },
}

/// The layer that a file is of.
fn stem(file: &str) -> Option<&str> {
    file.strip_suffix(".erofs")
        .or_else(|| file.strip_suffix(".idx"))
}

fn key(name: &LayerName) -> String {
    let image = name.image();
    stem(image.as_str()).unwrap_or_default().to_owned()
}

impl Layer {
    fn fail(&mut self, why: String, lasting: bool, now: Instant) {
        let until = now + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        self.phase = Phase::Failed {
            why,
            lasting,
            until,
        };
    }
}

impl State {
    pub(super) fn begin(&mut self) {
        (self.begun, self.clean) = (true, true);
    }

    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    pub(super) fn know(&mut self, recipe: Recipe) {
        let key = key(&recipe.name);
        self.layers.entry(key).or_insert(Layer {
            recipe,
            phase: Phase::Idle,
            pause: FIRST_PAUSE,
        });
    }

    pub(super) fn forget(&mut self, name: &LayerName) {
        let key = key(name);
        let Some(layer) = self.layers.remove(&key) else {
            return;
        };
        self.queue.retain(|other| *other != key);
        if let Some(running) = self.running.as_mut().filter(|job| job.layer == key) {
            running.unwanted = true;
        }
        self.clean |= !matches!(layer.phase, Phase::Idle);
    }

    pub(super) fn known(&self) -> usize {
        self.layers.len()
    }

    pub(super) fn readiness(&self, file: &str, after: Duration) -> Readiness {
        let layer = stem(file).and_then(|stem| self.layers.get(stem));
        match layer.map(|layer| &layer.phase) {
            None => Readiness::Never,
            Some(Phase::Ready { .. }) => Readiness::Ready,
            Some(_) => Readiness::After(after),
        }
    }

    /// Whether the layer is being made, or waits for one that is, or has just been.
    pub(super) fn is_at_work(&self, file: &str, now: Instant) -> bool {
        let layer = stem(file).and_then(|stem| self.layers.get(stem));
        match layer.map(|layer| &layer.phase) {
            Some(Phase::Queued | Phase::Running) => true,
            Some(Phase::Ready { since }) => now < *since + SEEN,
            _ => false,
        }
    }

    /// A request for a file; `fresh` if what was there before was wrong.
    pub(super) fn ask(&mut self, file: &str, fresh: bool, now: Instant) -> Answer {
        let unknown = || Answer::NotMade {
            reason: "it is not known where it came from".to_owned(),
            lasting: true,
        };
        let Some(stem) = stem(file) else {
            return unknown();
        };
        let Some(layer) = self.layers.get_mut(stem) else {
            return unknown();
        };
        if fresh && matches!(layer.phase, Phase::Ready { .. }) {
            // Next time it is looked at, and made anew if it has changed on disk.
            layer.fail("what was made has wrong bytes".to_owned(), true, now);
        }
        match &layer.phase {
            Phase::Ready { .. } => return Answer::Read,
            Phase::Failed {
                why,
                lasting,
                until,
            } if now < *until => {
                let reason = format!(
                    "making the layer again failed: {why} (tried again in {} s)",
                    until.saturating_duration_since(now).as_secs()
                );
                let lasting = *lasting;
                return Answer::NotMade { reason, lasting };
            }
            Phase::Queued | Phase::Running => {}
            Phase::Idle | Phase::Failed { .. } => {
                layer.phase = Phase::Queued;
                self.queue.push_back(stem.to_owned());
            }
        }
        Answer::Making(self.words(stem, now))
    }

    /// A file that was there is not.
    pub(super) fn lost(&mut self, file: &str) {
        let layer = stem(file).and_then(|stem| self.layers.get_mut(stem));
        if let Some(layer) = layer
            && matches!(layer.phase, Phase::Ready { .. })
        {
            layer.phase = Phase::Idle;
        }
    }

    pub(super) fn has_work(&self) -> bool {
        self.closed || (self.begun && (self.clean || !self.queue.is_empty()))
    }

    /// The next job. Not while one is running.
    pub(super) fn next(&mut self) -> Work {
        if self.closed {
            return Work::End;
        }
        self.clean = false;
        let keep = self.layers.values();
        let keep = keep.map(|layer| layer.recipe.name.image().to_string());
        let keep = keep.collect();
        while let Some(stem) = self.queue.pop_front() {
            let Some(layer) = self.layers.get_mut(&stem) else {
                continue;
            };
            layer.phase = Phase::Running;
            let recipe = Box::new(layer.recipe.clone());
            self.running = Some(Running {
                layer: stem,
                since: None,
                bytes: 0,
                unwanted: false,
            });
            return Work::Make { recipe, keep };
        }
        Work::Clean { keep }
    }

    /// The job that is running gets on with it.
    pub(super) fn progress(&mut self, bytes: u64, now: Instant) {
        if let Some(running) = &mut self.running {
            running.since.get_or_insert(now);
            running.bytes = bytes;
        }
    }

    /// Whether the job that is running is to end.
    pub(super) fn is_unwanted(&self) -> bool {
        self.closed || self.running.as_ref().is_some_and(|job| job.unwanted)
    }

    /// The job is over.
    pub(super) fn over(&mut self, made: bool, result: Result<(), Failure>, now: Instant) {
        if !made {
            return;
        }
        let Some(running) = self.running.take() else {
            return;
        };
        match &result {
            Ok(()) => self.made += 1,
            Err(_) => self.failed += 1,
        }
        let Some(layer) = self.layers.get_mut(&running.layer) else {
            // Whatever it left can go.
            self.clean = true;
            return;
        };
        layer.phase = match result {
            Ok(()) => Phase::Ready { since: now },
            // It was let go and attached again meanwhile.
            Err(_) if running.unwanted => Phase::Idle,
            Err(Failure { reason, lasting }) => return layer.fail(reason, lasting, now),
        };
    }

    /// How a layer stands.
    fn words(&self, stem: &str, now: Instant) -> String {
        let Some(layer) = self.layers.get(stem) else {
            return String::new();
        };
        let source = &layer.recipe.origin.source;
        match &layer.phase {
            Phase::Idle => "not needed".to_owned(),
            Phase::Queued => match &self.running {
                Some(_) => format!("to be made again from {source}, after another layer"),
                None => format!("to be made again from {source}"),
            },
            Phase::Running => {
                let bytes = self.running.as_ref().map_or(0, |running| running.bytes);
                format!("being made again from {source}, {bytes} bytes read")
            }
            Phase::Ready { .. } => format!("made again from {source}, in use"),
            Phase::Failed { why, until, .. } => {
                let left = until.saturating_duration_since(now).as_secs();
                match left {
                    0 => format!("cannot be made again: {why}; tried again when it is read"),
                    _ => format!("cannot be made again: {why}; not tried for {left} s"),
                }
            }
        }
    }

    /// The layers that something was done about, for people.
    pub(super) fn describe(&self, now: Instant) -> Vec<(String, String)> {
        let layers = self.layers.iter();
        let layers = layers.filter(|(_, layer)| !matches!(layer.phase, Phase::Idle));
        layers
            .map(|(stem, layer)| (layer.recipe.name.to_string(), self.words(stem, now)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Origin;
    use super::*;
    use accel_oci::{ChainId, DiffId, Digest};
    use accel_ufs::index::{ImageSize, Root};

    fn recipe(seed: &[u8]) -> Recipe {
        let diff_id = DiffId(Digest::of(seed));
        Recipe {
            name: LayerName::Layer(diff_id),
            root: Root([1; 32]),
            size: ImageSize::new(4096).unwrap(),
            origin: Origin {
                source: "docker://h/r:t".to_owned(),
                platform: serde_json::from_str(r#"{"os": "linux", "architecture": "amd64"}"#)
                    .unwrap(),
                diff_id,
                chain_id: ChainId(diff_id.0),
            },
        }
    }

    fn failure(lasting: bool) -> Failure {
        Failure {
            reason: "no route".to_owned(),
            lasting,
        }
    }

    #[test]
    fn one_job_at_a_time_and_one_per_layer() {
        let now = Instant::now();
        let (a, b) = (recipe(b"a"), recipe(b"b"));
        let (image, index) = (a.name.image(), a.name.index());
        let mut state = State::default();
        let after = Duration::from_secs(10);
        assert_eq!(state.readiness(image.as_str(), after), Readiness::Never);
        state.know(a.clone());
        state.know(b.clone());
        assert_eq!(
            state.readiness(image.as_str(), after),
            Readiness::After(after)
        );
        for file in [&image, &index, &b.name.index()] {
            assert!(matches!(
                state.ask(file.as_str(), false, now),
                Answer::Making(_)
            ));
            assert!(state.is_at_work(file.as_str(), now));
        }
        assert!(!state.has_work(), "not everything is known yet");
        state.begin();
        let Work::Make { recipe, keep } = state.next() else {
            panic!("no job");
        };
        assert_eq!((recipe.name, keep.len()), (a.name, 2));
        state.progress(77, now);
        let Answer::Making(words) = state.ask(index.as_str(), false, now) else {
            panic!("it is running");
        };
        assert!(words.contains("77 bytes"), "{words}");
        state.over(true, Ok(()), now);
        assert_eq!(state.readiness(index.as_str(), after), Readiness::Ready);
        assert_eq!(state.ask(image.as_str(), false, now), Answer::Read);
        assert!(matches!(state.next(), Work::Make { recipe, .. } if recipe.name == b.name));
        // What it gave was wrong, or is gone.
        let answer = state.ask(image.as_str(), true, now);
        assert!(matches!(answer, Answer::NotMade { lasting: true, .. }));
        assert!(!state.is_at_work(image.as_str(), now));
        let answer = state.ask(image.as_str(), false, now + FIRST_PAUSE);
        assert!(matches!(answer, Answer::Making(_)));
        state.over(true, Ok(()), now);
        state.lost(b.name.image().as_str());
        assert_eq!(
            state.readiness(b.name.image().as_str(), after),
            Readiness::After(after)
        );
    }

    #[test]
    fn failures_are_told_and_tried_again_later_and_later() {
        let mut now = Instant::now();
        let a = recipe(b"a");
        let image = a.name.image();
        let mut state = State::default();
        state.know(a);
        state.begin();
        for round in 0..4_u32 {
            assert!(matches!(
                state.ask(image.as_str(), false, now),
                Answer::Making(_)
            ));
            assert!(matches!(state.next(), Work::Make { .. }));
            state.over(true, Err(failure(round == 3)), now);
            let Answer::NotMade { reason, lasting } = state.ask(image.as_str(), false, now) else {
                panic!("it has failed");
            };
            assert!(reason.contains("no route"), "{reason}");
            assert_eq!(lasting, round == 3);
            assert!(!state.is_at_work(image.as_str(), now));
            now += FIRST_PAUSE * 2_u32.pow(round) - Duration::from_millis(1);
            assert!(matches!(
                state.ask(image.as_str(), false, now),
                Answer::NotMade { .. }
            ));
            now += Duration::from_millis(1);
        }
        assert_eq!(state.failed, 4);
    }

    #[test]
    fn what_nobody_needs_goes() {
        let now = Instant::now();
        let (a, b) = (recipe(b"a"), recipe(b"b"));
        let mut state = State::default();
        state.know(a.clone());
        state.know(b.clone());
        state.begin();
        assert!(matches!(state.next(), Work::Clean { keep } if keep.len() == 2));
        assert!(!state.has_work());
        state.forget(&b.name);
        assert!(!state.has_work(), "nothing was made");
        state.ask(a.name.image().as_str(), false, now);
        state.next();
        assert!(!state.is_unwanted());
        state.forget(&a.name);
        assert!(state.is_unwanted());
        state.over(true, Err(failure(false)), now);
        assert!(matches!(state.next(), Work::Clean { keep } if keep.is_empty()));
        state.close();
        assert!(matches!(state.next(), Work::End));
    }
}
