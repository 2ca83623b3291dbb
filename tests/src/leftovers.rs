//! What a mounted image or a daemon could leave behind on the machine: mounts,
//! devices, processes, files. Taken before and after, it has to be the same.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};

use crate::Setting;

/// Everything of ours that is there now, one line each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State(BTreeSet<String>);

impl State {
    /// Looks around.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn now(setting: &Setting) -> Result<Self> {
        let mut found = BTreeSet::new();
        let scratch = setting.scratch.to_string_lossy().into_owned();
        for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            // "… / /mount/point options - type source superblock-options"
            let kind = line
                .split(" - ")
                .nth(1)
                .and_then(|rest| rest.split(' ').next())
                .unwrap_or("");
            if matches!(kind, "erofs" | "overlay" | "fuse" | "fuseblk")
                || line.contains("/accel-e2e.")
            {
                found.insert(format!("mount {line}"));
            }
        }
        for (directory, prefix) in [
            ("/dev", "ublk"),
            ("/sys/block", "ublk"),
            ("/run", "accel"),
            ("/run", "image-accel"),
            ("/run", "ublk"),
        ] {
            for name in names_in(Path::new(directory)) {
                if name.starts_with(prefix) {
                    found.insert(format!("file {directory}/{name}"));
                    for below in names_in(&Path::new(directory).join(&name)) {
                        if directory == "/run" {
                            found.insert(format!("file {directory}/{name}/{below}"));
                        }
                    }
                }
            }
        }
        for name in names_in(Path::new("/sys/block")) {
            if let Ok(file) = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")) {
                found.insert(format!("loop device {name} of {}", file.trim_end()));
            }
        }
        for name in names_in(&setting.scratch) {
            if name.starts_with("accel-e2e.") {
                for below in names_in(&setting.scratch.join(&name)) {
                    found.insert(format!("file {scratch}/{name}/{below}"));
                }
                found.insert(format!("file {scratch}/{name}"));
            }
        }
        for pid in names_in(Path::new("/proc")) {
            if let Ok(program) = fs::read_link(format!("/proc/{pid}/exe"))
                && program.starts_with(&setting.bin)
                && pid != std::process::id().to_string()
            {
                found.insert(format!("process {pid} {}", program.display()));
            }
        }
        Ok(Self(found))
    }

    /// Fails when there is something now that was not there at `self`, or something
    /// is gone.
    ///
    /// # Errors
    /// Names it.
    pub fn check_same_now(&self, setting: &Setting) -> Result<()> {
        let now = Self::now(setting)?;
        let more: Vec<_> = now.0.difference(&self.0).cloned().collect();
        let less: Vec<_> = self.0.difference(&now.0).cloned().collect();
        ensure!(more.is_empty(), "left behind:\n{}", more.join("\n"));
        ensure!(
            less.is_empty(),
            "gone, and not ours to remove:\n{}",
            less.join("\n")
        );
        Ok(())
    }

    /// Does any line contain this?
    pub fn mentions(&self, text: &str) -> bool {
        self.0.iter().any(|line| line.contains(text))
    }
}

fn names_in(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}
