//! In which order a converter asks the kernel for things: what gets a final name was synced
//! before, and the directory with that name is synced before anything relies on it. As a
//! crash of the machine would show, but without one.

mod common;

use common::{Image, Tar, Ufs, sample_tar};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the converter did, each when it was done.
#[derive(Debug)]
enum Step {
    /// Changed a file's bytes or its size.
    Write(PathBuf),
    Sync(PathBuf),
    Directory(PathBuf),
    /// The old name, the new one.
    Name(PathBuf, PathBuf),
}

/// The paths in a system call: those of descriptors, then those in quotes.
fn paths(call: &str) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let descriptors = call.split('<').skip(1);
    let descriptors = descriptors.filter_map(|rest| Some(rest.split_once('>')?.0.into()));
    let quoted = call.split('"').skip(1).step_by(2).map(PathBuf::from);
    (descriptors.collect(), quoted.collect())
}

/// The steps in a log of strace, which puts what a thread interrupts on a line of its own.
fn steps(log: &str) -> Vec<Step> {
    let mut begun: HashMap<&str, &str> = HashMap::new();
    let mut steps = Vec::new();
    for line in log.lines() {
        let (thread, call) = line.split_once(' ').expect("a thread's id");
        let call = call.trim_start();
        // Of a thread that strace saw last when the process ended.
        if call.ends_with("<detached ...>") {
            continue;
        }
        if let Some(start) = call.strip_suffix("<unfinished ...>") {
            begun.insert(thread, start);
            continue;
        }
        let call = match call.starts_with("<... ") {
            true => begun.remove(thread).expect("what is resumed was begun"),
            false => call,
        };
        let resumed = line.rsplit_once(" = ");
        let resumed = resumed.unwrap_or_else(|| panic!("no result: {line}")).1;
        if resumed.starts_with('-') {
            continue;
        }
        let (descriptors, mut names) = paths(call);
        let (name, _) = call.split_once('(').expect("a system call");
        steps.push(match name {
            "fsync" | "fdatasync" => Step::Sync(descriptors[0].clone()),
            "mkdir" | "mkdirat" => Step::Directory(names.remove(0)),
            "link" | "linkat" | "rename" | "renameat" | "renameat2" => {
                Step::Name(names.remove(0), names.remove(0))
            }
            _ => Step::Write(descriptors[0].clone()),
        });
    }
    steps
}

fn trace(image: &Image, ufs: &Path, log: &Path) -> Vec<Step> {
    let output = Command::new("strace")
        .args(["-f", "-y", "-qq", "-s0", "-e", "signal=none", "-e"])
        .arg(
            "trace=fsync,fdatasync,?mkdir,mkdirat,?link,linkat,?rename,?renameat,renameat2,\
             write,pwrite64,writev,pwritev,pwritev2,ftruncate,fallocate,copy_file_range",
        )
        .arg("-o")
        .arg(log)
        .arg(env!("CARGO_BIN_EXE_mkfs-accel"))
        .args(["convert", "--jobs", "1", &image.source(), "--ufs"])
        .arg(ufs)
        .output()
        .unwrap_or_else(|error| panic!("strace: {error}; apt-get install strace"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    steps(&fs::read_to_string(log).unwrap())
}

#[test]
fn names_appear_only_on_what_is_synced() {
    let image = Image::gzipped(&[
        sample_tar(1),
        Tar::new()
            .file("opt/x", b"in an implied directory")
            .finish(),
    ]);
    let ufs = Ufs::new();
    let directory = tempfile::tempdir().unwrap();
    let root = ufs.path().canonicalize().unwrap();
    let steps = trace(&image, &root, &directory.path().join("log"));
    let after = |from: usize, wanted: &dyn Fn(&Step) -> bool| {
        let at = steps[from..].iter().position(wanted);
        at.map_or(steps.len(), |at| from + at)
    };
    let is_sync = |step: &Step, of: &Path| matches!(step, Step::Sync(path) if path == of);
    let mut published = Vec::new();
    for (at, step) in steps.iter().enumerate() {
        let Step::Name(old, new) = step else { continue };
        let name = new.strip_prefix(&root).expect("a name on UFS");
        // A lease is there for others to see while its process lives, not for a crash.
        if name.starts_with("leases") {
            continue;
        }
        published.push(name.to_owned());
        let is_write = |step: &Step| matches!(step, Step::Write(path) if path == old);
        let written = steps.iter().rposition(is_write);
        let written = written.unwrap_or_else(|| panic!("nobody wrote {name:?}"));
        let synced = after(written, &|step| is_sync(step, old));
        assert!(synced < at, "{name:?} had its name before it was synced");
        // Its directory is synced before anything else gets a name.
        let above = new.parent().unwrap();
        let synced = after(at, &|step| is_sync(step, above));
        let next = after(at + 1, &|step| matches!(step, Step::Name(..)));
        assert!(
            synced < next,
            "{name:?} was not safe when the next was named"
        );
        assert!(synced < steps.len(), "{name:?} was never safe");
        // And so are those above it, from when they were made.
        for made in above.ancestors().take_while(|above| *above != root) {
            let is_made = |step: &Step| matches!(step, Step::Directory(path) if path == made);
            let Some(made_at) = steps[..at].iter().position(is_made) else {
                panic!("nobody made {made:?}");
            };
            let synced = after(made_at, &|step| is_sync(step, made.parent().unwrap()));
            assert!(synced < at, "{made:?} was not safe when {name:?} was named");
        }
    }
    // The claim before anything that it is for. The image before its index, all of both
    // before the record, which what mounting it reads comes before; the source's name last.
    let kinds: Vec<&str> = published
        .iter()
        .map(
            |name| match name.extension().and_then(|name| name.to_str()) {
                Some("json") => name.iter().next().unwrap().to_str().unwrap(),
                extension => extension.unwrap(),
            },
        )
        .collect();
    assert_eq!(
        kinds,
        [
            "claims",
            "erofs",
            "idx",
            "by-digest",
            "erofs",
            "idx",
            "by-digest",
            "start",
            "images",
            "names"
        ]
    );
}
