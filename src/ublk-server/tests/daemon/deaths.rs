//! The daemon and its keeper die; so do clients in the middle of a mount.

use super::common::node::{Node, PROGRAM, base, big, check_big, kill, serve};
use super::common::{Entry, publish_image, publish_tree};
use rustix::process::Signal;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

#[test]
fn a_killed_daemon_is_not_noticed() {
    let mut made = None;
    let mut node = Node::start(|ufs| made = Some(big(ufs)));
    let (image, files) = made.unwrap();
    let root = node.directory("root");
    node.ask(&["mount", &image, &root]);
    check_big(&root, &files);
    for _ in 0..3 {
        // Reads that are surely under way: what they wait for does not come.
        kill(&node.status()["sources"][0]["worker"], Signal::STOP);
        let missed = |node: &Node| node.status()["exports"][0]["misses"].as_u64().unwrap();
        let before = missed(&node);
        std::thread::scope(|scope| {
            scope.spawn(|| check_big(&root, &files));
            scope.spawn(|| check_big(&root, &files[..3]));
            while missed(&node) == before {
                std::thread::yield_now();
            }
            node.child.kill().unwrap();
            node.child.wait().unwrap();
            node.child = serve(node.directory.path());
            // While that starts, and after it.
            check_big(&root, &files[..1]);
        });
        assert_eq!(node.status()["exports"][0]["errors"], 0);
        assert_eq!(node.status()["failed_reads"], 0);
    }
    // And in an orderly way.
    let over = AtomicBool::new(false);
    let node = std::thread::scope(|scope| {
        let (over, root, files) = (&over, &root, &files);
        let reader = scope.spawn(move || {
            while !over.load(Relaxed) {
                check_big(root, files);
            }
        });
        let node = node.restart().restart();
        over.store(true, Relaxed);
        reader.join().unwrap();
        node
    });
    node.ask(&["unmount", &root]);
    node.stop();
}

#[test]
fn a_killed_keeper_is_replaced_and_the_last_connection_ends_it() {
    let mut made = None;
    let mut node = Node::start(|ufs| made = Some(big(ufs)));
    let (image, files) = made.unwrap();
    let root = node.directory("root");
    assert!(node.status()["keeper"].is_null());
    node.ask(&["mount", &image, &root]);
    for _ in 0..3 {
        let keeper = node.status()["keeper"].clone();
        kill(&keeper, Signal::KILL);
        check_big(&root, &files[..1]);
        while node.status()["keeper"] == keeper {
            std::thread::yield_now();
        }
    }
    node.kill_and_restart();
    check_big(&root, &files);
    let keeper = node.status()["keeper"].clone();
    assert!(keeper.is_i64(), "the next daemon has no keeper");
    node.ask(&["unmount", &root]);
    assert!(!Path::new(&format!("/proc/{keeper}/fd/0")).exists());
    assert!(node.status()["keeper"].is_null());
    // Without a daemon, unmounting is what ends it.
    node.ask(&["mount", &image, &root]);
    let keeper = node.status()["keeper"].clone();
    node.child.kill().unwrap();
    node.child.wait().unwrap();
    node.ask(&["unmount", &root]);
    while Path::new(&format!("/proc/{keeper}/fd/0")).exists() {
        std::thread::yield_now();
    }
    node.child = serve(node.directory.path());
    node.await_daemon();
    assert_eq!(node.status()["exports"].as_array().unwrap().len(), 0);
    node.stop();
}

#[test]
fn with_daemon_and_keeper_dead_an_image_can_be_mounted_anew() {
    let mut made = None;
    let mut node = Node::start(|ufs| made = Some(big(ufs)));
    let (image, files) = made.unwrap();
    let (root, other) = (node.directory("root"), node.directory("other"));
    node.ask(&["mount", &image, &root]);
    let held = File::open(Path::new(&root).join("f1")).unwrap();
    let keeper = node.status()["keeper"].clone();
    node.child.kill().unwrap();
    node.child.wait().unwrap();
    kill(&keeper, Signal::KILL);
    node.child = serve(node.directory.path());
    node.await_daemon();
    node.ask(&["mount", &image, &other]);
    check_big(&other, &files);
    drop(held);
    node.ask(&["unmount", &root]);
    check_big(&other, &files);
    node.ask(&["unmount", &other]);
    node.stop();
}

#[test]
fn a_kill_while_mounting_or_unmounting_leaves_a_mount_or_none() {
    let mut made = None;
    let mut node = Node::start(|ufs| {
        let (base, files) = base(ufs);
        let top: &[Entry<'_>] = &[("etc/name", Some(b"top\n"))];
        let top = publish_tree(ufs, "top", top);
        made = Some((publish_image(ufs, &[base, top]).to_string(), files));
    });
    let (image, files) = made.unwrap();
    let root = node.directory("root");
    let (mut mounted, mut not) = (0, 0);
    for delay in 0..12 {
        let words = if delay % 3 == 2 { "unmount" } else { "mount" };
        if words == "unmount" {
            node.ask(&["mount", &image, &root]);
        }
        let mut client = Command::new(PROGRAM);
        client.arg(words);
        if words == "mount" {
            client.arg(&image);
        }
        client.arg(&root).arg("--socket").arg(node.path("socket"));
        client.stdin(Stdio::null()).stderr(Stdio::null());
        let mut client = client.spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(delay * 8));
        node.child.kill().unwrap();
        node.child.wait().unwrap();
        if delay % 2 == 0 {
            let _ = client.kill();
        }
        node.child = serve(node.directory.path());
        client.wait().unwrap();
        node.await_daemon();
        // It is there, and right, or can be made so.
        let there = Path::new(&root).join("etc/name").exists();
        if there {
            for (path, content) in &files {
                assert!(fs::read(Path::new(&root).join(path)).unwrap() == *content);
            }
            mounted += 1;
            node.ask(&["unmount", &root]);
        } else {
            // Half a mount is taken back, or there is none.
            node.client(&["unmount", &root]);
            not += 1;
        }
        assert_eq!(node.mounts(), [""; 0], "{words}, {delay}");
        assert_eq!(node.status()["exports"].as_array().unwrap().len(), 0);
        node.ask(&["mount", &image, &root]);
        node.ask(&["unmount", &root]);
    }
    println!("{mounted} were mounted, {not} were not");
    node.stop();
}

#[test]
fn a_client_that_died_before_it_noted_anything_can_be_taken_back() {
    let mut images = Vec::new();
    let node = Node::start(|ufs| {
        let layer = base(ufs).0;
        images.push(publish_image(ufs, &[layer]));
        let other = publish_tree(ufs, "other", &[("file", Some(b"other"))]);
        images.push(publish_image(ufs, &[layer, other]));
    });
    let root = node.directory("root");
    let mut stream = UnixStream::connect(node.path("socket")).unwrap();
    let attach = serde_json::json!({
        "op": "attach", "image": images[0].to_string(), "holder": root
    });
    writeln!(stream, "{attach}").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("{\"ok\""), "{answer}");
    let other = images[1].to_string();
    let message = node.refused(&["mount", &other, &root]);
    assert!(message.contains("already holds"), "{message}");
    node.ask(&["unmount", &root]);
    node.ask(&["mount", &other, &root]);
    node.ask(&["unmount", &root]);
    node.refused(&["unmount", &root]);
    node.stop();
}
