//! `accel-snapshotter doctor`: what is wrong with a node, and how to mend it.
//!
//! [`look`] collects what there is to know; [`node`] and [`containerd`] judge it, and
//! touch nothing. Every fault comes with steps that mend it: commands, and changes of
//! containerd's configuration that are exact enough to be applied by a program.

pub mod containerd;
pub mod look;
pub mod node;

use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

/// How bad something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Containers start; something else does not work, or not as well as it could.
    Warning,
    /// Accelerated images do not start, or are downloaded.
    Fault,
}

/// Something that mends a fault.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// A shell command.
    Run(String),
    /// A value in a TOML file, which is made if need be.
    Set {
        /// The file.
        file: PathBuf,
        /// Names of the tables down to the one that it is in.
        table: Vec<String>,
        /// Its name.
        key: String,
        /// The value.
        value: toml::Value,
    },
    /// A table or value that must not be in a TOML file.
    Remove {
        /// The file.
        file: PathBuf,
        /// Names of the tables down to the one that it is in.
        table: Vec<String>,
        /// Its name.
        key: String,
    },
    /// What only a person can do.
    Do(String),
}

/// A change to a TOML file.
#[derive(Debug, Clone, Copy)]
pub struct Edit<'a> {
    /// The file.
    pub file: &'a Path,
    /// Names of the tables down to the one that is changed.
    pub table: &'a [String],
    /// What is changed there.
    pub key: &'a str,
    /// Its new value; none: it goes.
    pub value: Option<&'a toml::Value>,
}

impl Step {
    /// The change to a file that this is, if it is one.
    pub fn edit(&self) -> Option<Edit<'_>> {
        let (file, table, key, value) = match self {
            Self::Set {
                file,
                table,
                key,
                value,
            } => (file, table, key, Some(value)),
            Self::Remove { file, table, key } => (file, table, key, None),
            Self::Run(_) | Self::Do(_) => return None,
        };
        Some(Edit {
            file,
            table,
            key,
            value,
        })
    }
}

/// What was found about one thing.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    /// How bad it is.
    pub level: Level,
    /// What it is like.
    pub what: String,
    /// How to mend it.
    pub mend: Vec<Step>,
}

impl Finding {
    /// All is well.
    pub fn ok(check: &'static str, what: impl Into<String>) -> Self {
        Self::new(check, Level::Ok, what, Vec::new())
    }

    /// Something is not as it could be.
    pub fn warning(check: &'static str, what: impl Into<String>, mend: Vec<Step>) -> Self {
        Self::new(check, Level::Warning, what, mend)
    }

    /// Something is broken.
    pub fn fault(check: &'static str, what: impl Into<String>, mend: Vec<Step>) -> Self {
        Self::new(check, Level::Fault, what, mend)
    }

    fn new(check: &'static str, level: Level, what: impl Into<String>, mend: Vec<Step>) -> Self {
        Self {
            check,
            level,
            what: what.into(),
            mend,
        }
    }
}

/// Everything that was found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// One or more for everything that was looked at.
    pub findings: Vec<Finding>,
}

impl Report {
    /// The worst of it.
    pub fn worst(&self) -> Level {
        let levels = self.findings.iter().map(|finding| finding.level);
        levels.max().unwrap_or(Level::Ok)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            let level = match finding.level {
                Level::Ok => "ok     ",
                Level::Warning => "WARNING",
                Level::Fault => "FAULT  ",
            };
            writeln!(f, "{level} {}: {}", finding.check, finding.what)?;
            for step in &finding.mend {
                writeln!(f, "        {step}")?;
            }
        }
        let number = |level| {
            let all = self.findings.iter();
            all.filter(|finding| finding.level == level).count()
        };
        let (faults, warnings) = (number(Level::Fault), number(Level::Warning));
        writeln!(f, "{faults} faults, {warnings} warnings")
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Run(command) => write!(f, "run: {command}"),
            Self::Set {
                file,
                table,
                key,
                value,
            } => {
                let file = file.display();
                write!(f, "in {file}, {}: {key} = {value}", name_of(table))
            }
            Self::Remove { file, table, key } => {
                let file = file.display();
                write!(f, "in {file}, {}: remove {key:?}", name_of(table))
            }
            Self::Do(what) => f.write_str(what),
        }
    }
}

/// A table's name as TOML writes it.
fn name_of(table: &[String]) -> String {
    if table.is_empty() {
        return "above all tables".to_owned();
    }
    let plain = |name: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        !name.is_empty() && name.chars().all(plain)
    };
    let names: Vec<_> = table
        .iter()
        .map(|name| match plain(name) {
            true => name.clone(),
            false => format!("{name:?}"),
        })
        .collect();
    format!("[{}]", names.join("."))
}
