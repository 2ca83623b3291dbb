//! What the daemon and its processes may do, and whom they answer; over FUSE on this machine.
//! Needs what `daemon.rs` needs.

mod common;

use common::node::{Node, PROGRAM, big, check_big, children, field, mounted, nap};
use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

#[test]
fn every_process_has_only_what_it_needs() {
    let disk = tempfile::tempdir().unwrap();
    let further = ["--disk-cache".as_ref(), disk.path().as_os_str()];
    let mut made = None;
    let node = Node::start_with(&further, |ufs| made = Some(big(ufs)));
    let (image, files) = made.unwrap();
    let root = node.directory("root");
    node.ask(&["mount", &image, &root]);
    // DAC_READ_SEARCH; with DAC_OVERRIDE; with SYS_CHROOT and SYS_ADMIN.
    const READER: u64 = 1 << 2;
    const WRITER: u64 = READER | 1 << 1;
    const DAEMON: u64 = WRITER | 1 << 18 | 1 << 21;
    let check = |pid: &str, wanted: u64| {
        let set = |set| u64::from_str_radix(&field(pid, set), 16).unwrap();
        // One that was begun a moment ago has not come to giving up anything.
        for _ in 0..600 {
            if set("CapPrm") == wanted && set("CapBnd") & !DAEMON == 0 {
                break;
            }
            nap();
        }
        for name in ["CapPrm", "CapEff"] {
            assert_eq!(set(name), wanted, "{name} of {}", field(pid, "Name"));
        }
        // Nothing can be gained from what is in there, without new privileges.
        assert_eq!(set("CapBnd") & !DAEMON, 0);
        for set in ["CapInh", "CapAmb"] {
            assert_eq!(field(pid, set), "0000000000000000");
        }
        assert_eq!(field(pid, "NoNewPrivs"), "1");
    };
    // The disk cache is read by one process and written by another. They are begun with
    // the daemon, and nobody waits for them.
    while node.status()["disk_cache"]["in_use"] != true {
        nap();
    }
    let here = disk.path().to_str().unwrap();
    let of_disk = |name: &str| {
        let is_it = |child: &String| {
            let words = fs::read_to_string(format!("/proc/{child}/cmdline"));
            words.is_ok_and(|words| words.contains(name) && words.contains(here))
        };
        // Before it has begun its program it is called what the daemon is.
        for _ in 0..600 {
            let mut children = children(&node.child.id().to_string()).into_iter();
            if let Some(found) = children.find(is_it) {
                return found;
            }
            nap();
        }
        panic!("no {name} of the disk cache")
    };
    check(&of_disk("source-worker"), READER);
    check(&of_disk("disk-cache-worker"), WRITER);
    for _ in 0..2 {
        let status = node.status();
        check(&status["pid"].to_string(), DAEMON);
        check(&status["sources"][0]["worker"].to_string(), READER);
        check(&status["keeper"].to_string(), 0);
        check_big(&root, &files[..1]);
        node.ask(&["upgrade"]);
    }
    node.ask(&["unmount", &root]);
    node.stop();
}

/// Who converts need not be root, and its umask may let nobody else read.
#[test]
fn layers_of_other_owners_are_served() {
    fn give_away(path: &Path) {
        if path.is_dir() {
            for entry in fs::read_dir(path).unwrap() {
                give_away(&entry.unwrap().path());
            }
        }
        let mode = if path.is_dir() { 0o700 } else { 0o600 };
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        std::os::unix::fs::chown(path, Some(65534), Some(65534)).unwrap();
    }
    let mut made = None;
    let node = Node::start(|ufs| {
        made = Some(big(ufs));
        give_away(ufs);
    });
    let (image, files) = made.unwrap();
    let root = node.directory("root");
    node.ask(&["mount", &image, &root]);
    check_big(&root, &files[..2]);
    node.ask(&["unmount", &root]);
    node.stop();
}

#[test]
fn only_root_is_answered_and_nonsense_is_survived() {
    let (node, _, root, files) = mounted();
    let socket = node.path("socket");
    let found = fs::metadata(&socket).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!((found.mode() & 0o777, found.uid()), (0o600, 0));
    // Were its mode another: who asks counts.
    fs::set_permissions(node.directory.path(), Permissions::from_mode(0o711)).unwrap();
    let program = node.path("client");
    fs::copy(PROGRAM, &program).unwrap();
    let ask = || {
        let mut client = Command::new(&program);
        client
            .args(["status", "--socket"])
            .arg(&socket)
            .uid(65534)
            .gid(65534);
        client.output().unwrap()
    };
    let refused = ask();
    assert!(!refused.status.success(), "{refused:?}");
    fs::set_permissions(&socket, Permissions::from_mode(0o666)).unwrap();
    let refused = ask();
    assert!(!refused.status.success());
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("only root"), "{said}");
    // And whoever it is may talk nonsense.
    let mut seed = 7u32;
    for round in 0..200 {
        let mut stream = UnixStream::connect(&socket).unwrap();
        let bytes = common::noise(1 + round * 13, seed);
        seed = seed.wrapping_add(1);
        let mut line = br#"{"op":"attach","image":"#.to_vec();
        line.truncate(round % 24);
        line.extend(bytes);
        line.push(b'\n');
        let _ = stream.write_all(&line);
    }
    check_big(&root, &files[..1]);
    node.ask(&["unmount", &root]);
    node.stop();
}
