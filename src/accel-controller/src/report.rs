//! What `mkfs-accel convert --json-lines` says, `mkfs-accel check --json` and
//! `mkfs-accel delete --json`.

use crate::resource::UserStatus;
use accel_oci::ChainId;
pub use accel_oci::Problem;
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::collections::{BTreeMap, BTreeSet};

/// How far it was last, and what came out of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    /// The last line that told how far the work is.
    pub progress: Option<Progress>,
    /// Whether the registries let us do what is meant.
    pub checked: bool,
    /// Which does not, and why, if that is why it ended.
    pub refused: Option<Refused>,
    /// Whether UFS can be used, if that was tried.
    pub ufs: Option<Tried>,
    /// The end, when it has gone well.
    pub report: Option<Report>,
    /// What `mkfs-accel delete` says at its end.
    pub removal: Option<Removal>,
}

/// A registry that does not do what it is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Refused {
    /// Which; empty if it is none in particular.
    pub registry: String,
    /// Why.
    pub problem: Problem,
}

/// What came of a try of UFS.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Tried {
    /// Whether it can be written to and read.
    pub usable: bool,
    /// Why not.
    pub error: Option<String>,
}

/// What was removed, or why not.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Removal {
    /// What, unless nothing was.
    pub removed: Option<Removed>,
    /// Nodes because of which nothing was.
    pub in_use: Vec<UserStatus>,
    /// What stays although it should not.
    pub warnings: Vec<String>,
}

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub struct Removed {
    /// Layers.
    pub layers: u32,
    /// Layers that others need.
    pub kept: u32,
}

/// How far a conversion is.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Progress {
    /// Which of the platforms is being worked on.
    pub platform: String,
    /// Layers that it has.
    pub layers: u32,
    /// Those of them that are on UFS.
    pub layers_done: u32,
    /// What has to be read for the others, in bytes.
    pub bytes: u64,
    /// What has been read of that.
    pub bytes_done: u64,
}

/// What has been converted.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Report {
    /// The source's manifest, of the main platform.
    pub manifest: String,
    /// For each platform.
    pub images: Vec<Image>,
    /// What was pushed.
    pub accelerated: Vec<Accelerated>,
}

/// An image for one platform.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Image {
    /// Lowest first.
    pub layers: Vec<Layer>,
}

/// A layer that is on UFS.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Layer {
    /// The blob's size in the registry, in bytes.
    pub size: u64,
    /// Whether others need it, too.
    #[serde(default)]
    pub shared: bool,
    /// That of the layers up to this one.
    #[serde(default)]
    pub chain_id: Option<ChainId>,
    /// Its file.
    pub erofs: Erofs,
}

/// A layer's EROFS image.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Erofs {
    /// Where it lies on UFS.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
    /// That of its chunk index.
    pub index_size: u64,
}

/// A pushed image.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Accelerated {
    /// Digest of its manifest or index.
    pub manifest: String,
}

/// What an image's layers take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    /// How many there are, each counted once.
    pub layers: u32,
    /// In the registry, in bytes.
    pub original: u64,
    /// On UFS, in bytes.
    pub stored: u64,
    /// Those of these that others need, too.
    pub shared: u64,
}

impl Report {
    /// The chain IDs of all platforms' images, each once.
    pub fn chain_ids(&self) -> Vec<String> {
        let tops = self.images.iter().filter_map(|image| image.layers.last());
        let all: BTreeSet<_> = tops.filter_map(|top| top.chain_id).collect();
        all.iter().map(ChainId::to_string).collect()
    }

    /// What the layers of all platforms take. Those that several have count once.
    pub fn sizes(&self) -> Sizes {
        let layers = self.images.iter().flat_map(|image| &image.layers);
        let distinct: BTreeMap<_, _> = layers.map(|layer| (&layer.erofs.path, layer)).collect();
        let mut sizes = Sizes::default();
        for layer in distinct.values() {
            sizes.layers = sizes.layers.saturating_add(1);
            sizes.original = sizes.original.saturating_add(layer.size);
            let erofs = &layer.erofs;
            let stored = erofs.size.saturating_add(erofs.index_size);
            sizes.stored = sizes.stored.saturating_add(stored);
            if layer.shared {
                sizes.shared = sizes.shared.saturating_add(stored);
            }
        }
        sizes
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Progress {
        progress: Progress,
    },
    Checked {
        #[serde(rename = "checked")]
        _checked: IgnoredAny,
    },
    Refused {
        refused: Refused,
    },
    Ufs {
        ufs: Tried,
    },
    Report(Report),
    Removal(Removal),
}

/// Reads a log. Lines that say something else are for people.
pub fn read(log: &str) -> Output {
    let mut output = Output::default();
    for line in log.lines().filter(|line| line.starts_with('{')) {
        match serde_json::from_str(line) {
            Ok(Line::Progress { progress }) => output.progress = Some(progress),
            Ok(Line::Checked { .. }) => output.checked = true,
            Ok(Line::Refused { refused }) => output.refused = Some(refused),
            Ok(Line::Ufs { ufs }) => output.ufs = Some(ufs),
            Ok(Line::Report(report)) => output.report = Some(report),
            Ok(Line::Removal(removal)) => output.removal = Some(removal),
            Err(_) => {}
        }
    }
    output
}

/// What the log says to people.
pub fn words(log: &str) -> String {
    let mut lines = Vec::new();
    for line in log.lines().map(str::trim) {
        if !line.is_empty() && !line.starts_with('{') {
            lines.push(line.strip_prefix("mkfs-accel: ").unwrap_or(line));
        }
    }
    lines.join(" ")
}

/// A number of bytes, in units that people read.
pub fn bytes(bytes: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in units {
        if bytes >= 1 << shift {
            let tenths = (u128::from(bytes) * 10 + (1 << (shift - 1))) >> shift;
            return format!("{}.{} {unit}", tenths / 10, tenths % 10);
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = r#"{"progress":{"platform":"linux/amd64","layers":2,"layers_done":0,"bytes":30,"bytes_done":0}}
a warning
{"progress":{"platform":"linux/amd64","layers":2,"layers_done":1,"bytes":30,"bytes_done":10}}
{"source":"docker://h/a:v1","manifest":"sha256:aa","seconds":1.5,"layers":[],"left_out":[],"images":[{"platform":"linux/amd64","manifest":"sha256:aa","layers":[{"fate":"converted","chain_id":"sha256:1111111111111111111111111111111111111111111111111111111111111111","size":10,"shared":false,"erofs":{"path":"layers/1","size":4096,"root":"00","uuid":"0","index_size":64}},{"fate":"present","chain_id":"sha256:2222222222222222222222222222222222222222222222222222222222222222","size":20,"shared":true,"erofs":{"path":"layers/2","size":8192,"index_size":64}}]},{"platform":"linux/arm64","manifest":"sha256:bb","layers":[{"fate":"present","size":20,"shared":true,"erofs":{"path":"layers/2","size":8192,"index_size":64}}]}],"accelerated":[{"target":"docker://h/a:v1-acc","manifest":"sha256:cc"}]}
"#;

    #[test]
    fn a_log_tells_how_far_and_what_came_out() {
        let output = read(LOG);
        assert_eq!(output.progress.unwrap().layers_done, 1);
        let report = output.report.unwrap();
        assert_eq!(report.accelerated[0].manifest, "sha256:cc");
        let expected = Sizes {
            layers: 2,
            original: 30,
            stored: 4096 + 8192 + 128,
            shared: 8192 + 64,
        };
        assert_eq!(report.sizes(), expected);
        // That of the whole image. A Job of an older version tells none.
        let top = format!("sha256:{}", "2".repeat(64));
        assert_eq!(report.chain_ids(), [top]);
    }

    #[test]
    fn a_log_that_ends_in_the_middle_of_a_line_has_no_report() {
        let cut = &LOG[..LOG.len() - 20];
        let output = read(cut);
        assert_eq!(output.report, None);
        assert!(output.progress.is_some());
    }

    #[test]
    fn what_registries_say_is_told() {
        let output = read("{\"checked\":{\"source\":\"h/a\",\"targets\":[]}}\n");
        assert!(output.checked && output.refused.is_none());
        let refused = |problem: &str| {
            let line = format!("{{\"refused\":{{\"registry\":\"h\",\"problem\":\"{problem}\"}}}}");
            read(&line).refused.unwrap().problem
        };
        assert_eq!(refused("Forbidden"), Problem::Forbidden);
        assert_eq!(refused("OfANewerVersion"), Problem::Other);
    }

    #[test]
    fn what_came_of_trying_ufs_is_told() {
        let tried = |line: &str| read(line).ufs.unwrap();
        let good = tried("{\"ufs\":{\"usable\":true,\"error\":null}}");
        assert!(good.usable && good.error.is_none());
        let bad = tried("{\"ufs\":{\"usable\":false,\"error\":\"why\"}}");
        assert_eq!((bad.usable, bad.error.as_deref()), (false, Some("why")));
    }

    #[test]
    fn what_was_removed_is_told() {
        let read = |line: &str| read(line).removal.unwrap();
        let gone = read(
            r#"{"removed":{"layers":2,"images":["sha256:aa"],"bytes":9,"kept":1},"in_use":[],"untagged":["h/a"],"warnings":["w"]}"#,
        );
        assert_eq!(gone.removed, Some(Removed { layers: 2, kept: 1 }));
        assert_eq!((gone.in_use.len(), gone.warnings.len()), (0, 1));
        let used = read(
            r#"{"removed":null,"in_use":[{"cluster":"c","node":"n1","expired":true,"layers":1}],"untagged":[],"warnings":[]}"#,
        );
        assert_eq!((used.removed, used.in_use[0].node.as_str()), (None, "n1"));
        assert!(used.in_use[0].expired);
    }

    #[test]
    fn people_get_the_words_alone() {
        let said = "{\"progress\":{}}\nmkfs-accel: cannot read h/a:v1: not found\n\n";
        assert_eq!(words(said), "cannot read h/a:v1: not found");
    }

    #[test]
    fn what_one_program_tells_another_one_understands() {
        for (problem, word) in [
            (Problem::NoLoginFile, "NoLoginFile"),
            (Problem::NoLogin, "NoLogin"),
            (Problem::Unauthorized, "Unauthorized"),
            (Problem::Forbidden, "Forbidden"),
            (Problem::NotFound, "NotFound"),
            (Problem::NoTarget, "NoTarget"),
            (Problem::Unreachable, "Unreachable"),
            (Problem::Other, "Other"),
        ] {
            let told = serde_json::json!(problem);
            assert_eq!(told, word);
            assert_eq!(serde_json::from_value::<Problem>(told).unwrap(), problem);
        }
    }
}
