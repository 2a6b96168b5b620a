use std::sync::atomic::AtomicUsize;

use super::*;

/// Every item is done exactly once, by a worker that exists, whatever the size of the team.
#[test]
fn every_item_is_done_once() {
    for count in [1, 2, 3, 8] {
        let workers = Workers::new(count).expect("threads can be started");
        assert_eq!(workers.count(), count);
        for n_items in [0, 1, 2, 3, 100, 1000] {
            let done: Vec<AtomicUsize> = (0..n_items).map(|_| AtomicUsize::new(0)).collect();
            workers.for_each(n_items, |item, worker| {
                assert!(worker < count);
                done[item].fetch_add(1, Ordering::Relaxed);
            });
            assert!(done.iter().all(|done| done.load(Ordering::Relaxed) == 1), "{count} workers, {n_items} items");
        }
    }
}

/// Many short regions in a row neither hang nor lose items, with far more workers than cores too.
#[test]
fn short_regions_in_a_row() {
    for (count, regions) in [(2, 20_000), (3, 5_000), (32, 2_000)] {
        let workers = Workers::new(count).expect("threads can be started");
        let sum = AtomicUsize::new(0);
        for _ in 0..regions {
            workers.for_each(7, |item, _| {
                sum.fetch_add(item, Ordering::Relaxed);
            });
        }
        assert_eq!(sum.into_inner(), regions * 21);
    }
}

/// A team that has gone to sleep wakes up again.
#[test]
fn sleeping_team_wakes() {
    let workers = Workers::new(3).expect("threads can be started");
    for _ in 0..5 {
        thread::sleep(std::time::Duration::from_millis(5));
        let both = std::sync::Barrier::new(2);
        // Two items that wait for each other: one worker alone would hang.
        workers.for_each(2, |_, _| {
            both.wait();
        });
    }
}

/// Each worker that took part leaves a region once, after its last item, and so does one whose item panics.
#[test]
fn workers_leave_regions() {
    static LEFT: AtomicUsize = AtomicUsize::new(0);
    let leave = || _ = LEFT.fetch_add(1, Ordering::SeqCst);
    for count in [1, 2, 5] {
        let workers = Workers::new(count).expect("threads can be started");
        for (n_items, bad) in [(1, 7), (40, 77), (40, 20)] {
            LEFT.store(0, Ordering::SeqCst);
            let took_part: Vec<AtomicBool> = (0..count).map(|_| AtomicBool::new(false)).collect();
            let item = |item: usize, worker: usize| {
                took_part[worker].store(true, Ordering::SeqCst);
                assert!(item != bad, "item {bad} is bad");
            };
            let done = catch_unwind(AssertUnwindSafe(|| workers.for_each_then(n_items, item, leave)));
            assert_eq!(done.is_err(), bad < n_items);
            let left = LEFT.load(Ordering::SeqCst);
            let worked = took_part.iter().filter(|worker| worker.load(Ordering::SeqCst)).count();
            assert!((worked..=count).contains(&left), "{left} left, {worked} of {count} worked");
        }
    }
}

/// A thread that is woken for a region that is over already says that it sleeps when it sleeps again, so that the next region
/// wakes it.
#[test]
fn late_wake_is_not_the_last() {
    let workers = Workers::new(2).expect("threads can be started");
    let shared = &workers.shared;
    let wait_for_sleep = || {
        while !shared.asleep[1].load(Ordering::SeqCst) {
            thread::yield_now();
        }
    };
    for _ in 0..5 {
        wait_for_sleep();
        // What a caller does that lost its core between `open` and `wake` while the thread did all of the work.
        shared.wake(1, &workers.threads[0]);
    }
    wait_for_sleep();
}

/// Teams that are dropped while their threads are still on their way to a region or to sleep end.
#[test]
fn busy_teams_end() {
    for i in 0..2_000_u32 {
        let workers = Workers::new(3).expect("threads can be started");
        workers.for_each(3, |_, _| {});
        // Drops at another moment each time.
        (0..i % 200 * 8).for_each(|_| hint::spin_loop());
    }
}

/// A panic in an item reaches the caller with its message, and the team works afterwards.
#[test]
fn panic_reaches_the_caller() {
    for count in [1, 3] {
        let workers = Workers::new(count).expect("threads can be started");
        for bad in [0, 5, 99] {
            let run = || workers.for_each(100, |item, _| assert!(item != bad, "item {bad} is bad"));
            let panic = catch_unwind(AssertUnwindSafe(run)).expect_err("an item panics");
            assert_eq!(panic.downcast_ref::<String>().map(String::as_str), Some(format!("item {bad} is bad").as_str()));
            let done = AtomicUsize::new(0);
            workers.for_each(50, |_, _| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 50);
        }
    }
}

/// Calls from several threads take turns, and a call from inside a region runs inline instead of hanging.
#[test]
fn concurrent_and_nested_calls() {
    let workers = Workers::new(2).expect("threads can be started");
    let inside = AtomicUsize::new(0);
    let sum = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    workers.for_each(3, |_, worker| {
                        assert!(inside.fetch_add(1, Ordering::SeqCst) < 2, "two regions at once");
                        workers.for_each(4, |item, inner| {
                            assert_eq!(inner, worker);
                            sum.fetch_add(item, Ordering::Relaxed);
                        });
                        inside.fetch_sub(1, Ordering::SeqCst);
                    });
                }
            });
        }
    });
    assert_eq!(sum.into_inner(), 4 * 200 * 3 * 6);
}

/// With more workers than cores, whoever waits gives way almost at once instead of holding up those who work: from the end of
/// a region to its sleep a thread pauses on its core [`SPINS_OVERSUBSCRIBED`] times at most, and so does the caller at the end
/// of one.
#[test]
fn more_workers_than_cores_give_way() {
    const REGIONS: usize = 20;
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let workers = Workers::new(8 * cores).expect("threads can be started");
    let done = AtomicUsize::new(0);
    for _ in 0..REGIONS {
        workers.for_each(48, |item, _| {
            hint::black_box((0..1000_u64).fold(item as u64, |sum, i| hint::black_box(sum ^ i)));
            done.fetch_add(1, Ordering::Relaxed);
        });
        while (1..workers.count()).any(|worker| !workers.shared.asleep[worker].load(Ordering::SeqCst)) {
            thread::yield_now();
        }
    }
    assert_eq!(done.into_inner(), REGIONS * 48);
    // Each worker waits once after each region, and the threads before the first.
    let waits = workers.count() * (REGIONS + 1);
    let pauses = workers.shared.n_pauses.load(Ordering::Relaxed) as usize;
    assert!(pauses <= waits * SPINS_OVERSUBSCRIBED as usize, "{pauses} pauses in at most {waits} waits");
}
