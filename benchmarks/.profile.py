import sys, torch
sys.argv=["x"]; sys.path.insert(0,"benchmarks")
import gpu_speed as g
from torch.profiler import profile, ProfilerActivity
for tokens, fields, train in ((43000,{},False),(43000,{"layer_precision":"fp8"},False),(10000,{},True)):
    b=g.Batch(tokens); step=None
    m=g.ours("650M","te",**fields).train(train)
    lab=b.packed["input_ids"]
    if train: f=lambda: g.forward_and_backward(m, lambda: m(**b.packed,labels=lab).loss)
    else: f=lambda: m(**b.packed).logits
    import contextlib
    with (contextlib.nullcontext() if train else torch.inference_mode()):
        for _ in range(4): f()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA,ProfilerActivity.CPU]) as p:
            f(); torch.cuda.synchronize()
    ev=[e for e in p.key_averages() if e.self_device_time_total>0 and e.device_type.name=="CUDA"]
    tot=sum(e.self_device_time_total for e in ev)
    print("PROFILE",tokens,fields,train,"total ms",tot/1e3)
    for e in sorted(ev,key=lambda e:-e.self_device_time_total)[:16]: print(f"  {100*e.self_device_time_total/tot:5.1f}% {e.self_device_time_total/1e3:8.2f} ms x{e.count:5d} {e.key[:110]}")
    if train:
        ev=sorted([e for e in p.key_averages() if e.self_cpu_time_total>0],key=lambda e:-e.self_cpu_time_total)[:14]
        for e in ev: print(f"  cpu {e.self_cpu_time_total/1e3:8.2f} ms x{e.count:5d} {e.key[:90]}")
