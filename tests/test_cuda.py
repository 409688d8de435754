"""What only a GPU can show: no synchronisation, no transient memory, capture in a graph, the CPU's bits."""

import pytest
import torch
from torch import nn

import mpengine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),  # it says so once
]

RULES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2, amsgrad=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
}


def network(device="cuda"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 300), nn.LayerNorm(300), nn.ReLU(), nn.Linear(300, 10)).to(device)


def iteration(model, optimizer, scaler, x, y):
    with torch.autocast("cuda", torch.float16):
        out = model(x)
    losses = nn.functional.cross_entropy(out.float(), y), out.float().square().mean()
    scaler.scale(losses[0], 0).backward(retain_graph=True)
    scaler.scale(losses[1], 1).backward()
    optimizer.step()
    scaler.update()
    optimizer.zero_grad()


def batch():
    return torch.randn(32, 64, device="cuda"), torch.randint(10, (32,), device="cuda")


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_an_iteration_never_waits_for_the_device(make):
    model, scaler = network(), mpengine.GradScaler(num_losses=2)
    optimizer = mpengine.prepare(model, make(model.parameters()), scaler, max_grad_norm=1.0)
    x, y = batch()
    iteration(model, optimizer, scaler, x, y)  # compiles, and makes the tables
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(5):
            optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
            iteration(model, optimizer, scaler, x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.steps_taken == 6


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_the_gpu_gives_the_cpus_bits(make):
    models = {device: network(device) for device in ("cpu", "cuda")}
    wrapped = {
        device: mpengine.prepare(model, make(model.parameters()), mpengine.GradScaler(device))
        for device, model in models.items()
    }
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        gradients = [torch.randn(p.shape, generator=generator) * 100 for p in models["cpu"].parameters()]
        if step in (0, 7):
            gradients[3][-1] = torch.inf
        for device, model in models.items():
            scaler = wrapped[device].scaler
            scaler.scale(torch.ones((), device=device, requires_grad=True))
            for param, gradient in zip(model.parameters(), gradients, strict=True):
                param.grad = gradient.to(device, param.dtype)
            scaler.step(wrapped[device])
            scaler.update()
    for master, other in zip(wrapped["cpu"].master_params(), wrapped["cuda"].master_params(), strict=True):
        assert torch.equal(master, other.cpu())
    for state, other in zip(wrapped["cpu"].state.values(), wrapped["cuda"].state.values(), strict=True):
        assert all(torch.equal(state[name], other[name].cpu()) for name in state)
    assert wrapped["cpu"].scaler.statistics() == wrapped["cuda"].scaler.statistics()
    assert wrapped["cuda"].steps_skipped == 2


def test_a_step_takes_no_memory():
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(8)]).cuda()
    scaler = mpengine.GradScaler()
    optimizer = mpengine.prepare(model, torch.optim.AdamW(model.parameters()), scaler, max_grad_norm=1.0)
    x = torch.randn(8, 1024, device="cuda", dtype=torch.float16)
    for _ in range(3):
        scaler.scale(model(x).float().square().mean()).backward()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        scaler.update()
        assert torch.cuda.max_memory_allocated() - before <= 2**20 or optimizer.steps_taken < 2  # tables come first
        optimizer.zero_grad()
    params = sum(p.numel() for p in model.parameters())
    held = torch.cuda.memory_allocated() - x.numel() * 2
    assert held <= 14 * params + 2**21  # fp16 weight 2, master 4, moments 8


def test_an_iteration_in_a_cuda_graph_equals_the_eager_one():
    x, y = batch()
    results = []
    for captured in (False, True):
        model, scaler = network(), mpengine.GradScaler(num_losses=2, growth_interval=4)
        optimizer = mpengine.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2), scaler)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                iteration(model, optimizer, scaler, x, y)
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                iteration(model, optimizer, scaler, x, y)
            for _ in range(10):
                graph.replay()
        else:
            for _ in range(10):
                iteration(model, optimizer, scaler, x, y)
        results.append([p.detach().clone() for p in model.parameters()])
        assert optimizer.steps_taken + optimizer.steps_skipped == 13
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)


def test_a_captured_graph_follows_a_schedule_by_the_steps_taken():
    x, y = batch()
    results = []
    for captured in (False, True):
        model, scaler = network(), mpengine.GradScaler(num_losses=2, growth_interval=2)
        optimizer = mpengine.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2), scaler)
        optimizer.schedule(lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=40), steps=40)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                iteration(model, optimizer, scaler, x, y)
        torch.cuda.current_stream().wait_stream(stream)
        run = iteration
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                iteration(model, optimizer, scaler, x, y)
            run = lambda *_, graph=graph: graph.replay()  # noqa: E731
        seen = []
        for _ in range(30):
            run(model, optimizer, scaler, x, y)
            seen.append((optimizer.steps_taken, optimizer.scheduled()))
        results.append((seen, [p.detach().clone() for p in model.parameters()]))
    assert results[0][0] == results[1][0]
    assert results[0][0][-1][0] < 33  # some of them were skipped
    for eager, replayed in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(eager, replayed)


def test_a_scheduled_iteration_never_waits_for_the_device():
    model, scaler = network(), mpengine.GradScaler(num_losses=2)
    optimizer = mpengine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), scaler)
    optimizer.schedule(lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=40), steps=40)
    x, y = batch()
    iteration(model, optimizer, scaler, x, y)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            iteration(model, optimizer, scaler, x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.scheduled()[0]["momentum"] < 0.95


def test_the_report_is_the_cpus():
    reports = {}
    for device in ("cpu", "cuda"):
        model, scaler = network(device), mpengine.GradScaler(device)
        optimizer = mpengine.prepare(model, torch.optim.AdamW(model.parameters()), scaler)
        generator = torch.Generator().manual_seed(1)
        scaler.scale(torch.ones((), device=device, requires_grad=True))
        for spoilt in (True, False):
            for param in model.parameters():
                gradient = torch.randn(param.shape, generator=generator) * 1e-4
                gradient.flatten()[0] = torch.inf if spoilt else 1.0
                param.grad = gradient.to(device, param.dtype)
            scaler.step(optimizer)
            scaler.update()
        reports[device] = scaler.report()
    assert reports["cuda"] == reports["cpu"]
    assert 0.1 < reports["cpu"][0].underflow < 0.9


def test_a_collapse_is_noticed_from_the_read_back():
    model, scaler = network(), mpengine.GradScaler(max_consecutive_skips=5)
    optimizer = mpengine.prepare(model, torch.optim.AdamW(model.parameters()), scaler)
    x, _ = batch()

    def collapse():
        for _ in range(50):
            scaler.scale(model(x.half()).float().sum() * torch.inf).backward()
            optimizer.step()
            scaler.update()
            optimizer.zero_grad()
            torch.cuda.synchronize()

    with pytest.raises(mpengine.LossScaleCollapse, match=r"0\.weight"):
        collapse()
