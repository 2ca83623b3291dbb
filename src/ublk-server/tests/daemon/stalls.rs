//! UFS stalls, or comes late.

use super::common::node::{
    Node, PROGRAM, await_that, base, big, check_big, drop_caches, field, kill, serve_with,
};
use super::common::{Stalled, publish_image, publish_tree};
use super::threads;
use rustix::process::Signal;
use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

#[test]
fn a_stalled_ufs_is_not_noticed_but_told() {
    let stalled = Stalled::new();
    let mut made = None;
    let mut node = Node::start(|ufs| {
        let (layer, files) = base(ufs);
        made = Some((publish_image(ufs, &[layer]).to_string(), files));
    });
    let (image, files) = made.unwrap();
    node.stall_ufs(&stalled);
    let root = node.directory("root");
    node.ask(&["mount", &image, &root]);
    drop_caches();
    for (path, content) in &files {
        assert!(fs::read(Path::new(&root).join(path)).unwrap() == *content);
    }
    // Others are asked before its time is over.
    await_that(|| node.status()["sources"][0]["in_use"] == false);
    let status = node.status();
    assert_eq!(status["sources"][1]["in_use"], true, "{status}");
    assert_eq!(status["failed_reads"], 0);
    let words = node.ask(&["status"]);
    for part in ["set aside", "does not answer", "no answer", "asked again"] {
        assert!(words.contains(part), "{part}: {words}");
    }
    node.ask(&["unmount", &root]);
    node.stop();
}

/// A worker that its source holds in the kernel ends when that answers: until then nobody
/// looks again and again whether it has.
#[test]
fn a_stuck_worker_is_waited_for_asleep() {
    let stalled = Stalled::new();
    let mut image = None;
    let mut node = Node::start(|ufs| image = Some(publish_image(ufs, &[base(ufs).0])));
    node.stall_ufs(&stalled);
    let root = node.directory("root");
    node.ask(&["mount", &image.unwrap().to_string(), &root]);
    await_that(|| node.status()["sources"][0]["dying"] != 0);
    let threads = threads(node.child.id(), "source");
    assert_eq!(threads.len(), 2, "one for each source");
    let slept = |thread: &str| -> u64 {
        let times = field(thread, "voluntary_ctxt_switches");
        times.parse().unwrap()
    };
    let before: Vec<_> = threads.iter().map(|thread| slept(thread)).collect();
    // While a hundred looks would fit in.
    std::thread::sleep(std::time::Duration::from_secs(1));
    for (thread, before) in threads.iter().zip(before) {
        let times = slept(thread) - before;
        assert!(times < 50, "it has looked {times} times");
    }
    assert_ne!(node.status()["sources"][0]["dying"], 0, "it is gone");
    node.ask(&["unmount", &root]);
    node.stop();
}

/// Mounts `from` at `to`.
fn bind(from: &Path, to: &Path) {
    rustix::mount::mount_bind(from, to).unwrap();
}

#[test]
fn a_ufs_that_is_mounted_late_or_anew_is_seen() {
    let mut made = None;
    let node = Node::start(|ufs| {
        let ready = ufs.parent().unwrap().join("ready");
        fs::create_dir(&ready).unwrap();
        made = Some(big(&ready));
    });
    let (image, files) = made.unwrap();
    let (root, ufs) = (node.directory("root"), node.path("ufs"));
    assert!(node.refused(&["mount", &image, &root]).contains("convert"));
    bind(&node.path("ready"), &ufs);
    // It was looked for less than a second ago.
    while !node.client(&["mount", &image, &root]).status.success() {
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    check_big(&root, &files[..1]);
    // What is there now goes away; the same is mounted from elsewhere, later.
    rustix::mount::unmount(&ufs, rustix::mount::UnmountFlags::DETACH).unwrap();
    let moved = node.path("moved");
    fs::rename(node.path("ready"), &moved).unwrap();
    fs::create_dir(node.path("copy")).unwrap();
    let copied = Command::new("cp")
        .arg("-a")
        .args([moved.join("."), node.path("copy")])
        .status();
    assert!(copied.unwrap().success());
    fs::remove_dir_all(&moved).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| check_big(&root, &files));
        bind(&node.path("copy"), &ufs);
    });
    assert_eq!(node.status()["failed_reads"], 0);
    node.ask(&["unmount", &root]);
    rustix::mount::unmount(&ufs, rustix::mount::UnmountFlags::DETACH).unwrap();
    node.stop();
}

#[test]
fn who_waits_for_a_stalled_ufs_holds_up_nobody_else() {
    let mut made = None;
    let mut node = Node::start(|ufs| {
        let (layer, _) = base(ufs);
        let other = publish_tree(ufs, "other", &[("file", Some(b"other"))]);
        made = Some(
            [[layer].as_slice(), &[other], &[layer, other]].map(|layers| {
                let image = publish_image(ufs, layers);
                image.to_string()
            }),
        );
    });
    let [one, two, three] = made.unwrap();
    node.child.kill().unwrap();
    node.child.wait().unwrap();
    // Nothing is given up while this test lasts.
    let further: [&OsStr; 2] = ["--attempt-timeout".as_ref(), "10m".as_ref()];
    node.child = serve_with(node.directory.path(), &further);
    node.await_daemon();
    let (first, second) = (node.directory("first"), node.directory("second"));
    node.ask(&["mount", &one, &first]);
    node.ask(&["mount", &two, &second]);
    let worker = node.status()["sources"][0]["worker"].clone();
    kill(&worker, Signal::STOP);
    std::thread::scope(|scope| {
        let third = node.directory("third");
        let (node, three) = (&node, &three);
        let waiting = scope.spawn(move || node.ask(&["mount", three, &third]));
        // While that waits: everything that needs nothing of UFS.
        node.ask(&["list"]);
        node.ask(&["unmount", &first]);
        node.ask(&["unmount", &second]);
        assert!(!waiting.is_finished(), "it did not wait for UFS");
        kill(&worker, Signal::CONT);
        waiting.join().unwrap();
    });
    let third = node.directory("third");
    let name = fs::read_to_string(Path::new(&third).join("file")).unwrap();
    assert_eq!(name, "other");
    // Nor does it hold up the end.
    kill(&worker, Signal::STOP);
    let mut client = Command::new(PROGRAM);
    client.args(["mount", &one, &first, "--socket"]);
    client.arg(node.path("socket")).stderr(Stdio::null());
    let mut client = client.spawn().unwrap();
    node.ask(&["unmount", &third]);
    node.stop();
    assert!(!client.wait().unwrap().success());
}

/// Of what is read ahead for an image nothing is waited for when the image goes.
#[test]
fn metadata_on_its_way_does_not_hold_up_the_unmount() {
    let mut image = None;
    let mut node = Node::start(|ufs| image = Some(publish_image(ufs, &[base(ufs).0])));
    let image = image.unwrap().to_string();
    node.child.kill().unwrap();
    node.child.wait().unwrap();
    // Nothing is given up while this test lasts.
    let further: [&OsStr; 2] = ["--attempt-timeout".as_ref(), "10m".as_ref()];
    node.child = serve_with(node.directory.path(), &further);
    node.await_daemon();
    let root = node.directory("root");
    let say = |command: serde_json::Value| {
        let mut stream = UnixStream::connect(node.path("socket")).unwrap();
        writeln!(stream, "{command}").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("{\"ok\""), "{answer}");
    };
    // As `mount` does before and after it mounts; in between UFS goes away.
    say(serde_json::json!({"op": "attach", "image": image, "holder": root}));
    let worker = node.status()["sources"][0]["worker"].clone();
    kill(&worker, Signal::STOP);
    say(serde_json::json!({"op": "mounted", "holder": root}));
    await_that(|| node.status()["exports"][0]["misses"] != 0);
    node.ask(&["unmount", &root]);
    let status = node.status();
    for list in ["exports", "holders"] {
        assert_eq!(status[list], serde_json::json!([]), "{status}");
    }
    assert_eq!(status["sources"][0]["worker"], worker);
    kill(&worker, Signal::CONT);
    node.stop();
}
